"""A figure of matplotlib as a flowable of reportlab: lines stay lines, and text stays text, in the document's own type."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.backend_bases import FigureCanvasBase, GraphicsContextBase, RendererBase
from matplotlib.figure import Figure
from matplotlib.path import Path
from matplotlib.transforms import Affine2D, Transform
from PIL import Image
from reportlab.lib.utils import ImageReader
from reportlab.pdfgen.canvas import Canvas
from reportlab.platypus import Flowable

_CAPS = {"butt": 0, "round": 1, "projecting": 2}
_JOINS = {"miter": 0, "round": 1, "bevel": 2}
_POINT = 72.0
_MAGNIFIED = 4  # cells of a picture: 288 an inch
_TILE = 72.0  # points of a hatch's unit square


class PlotOnPage(Flowable):
    """The figure at its own size, in points, scaled down to `width`. Drawn when the page is: inside `plot_style.drawing`."""

    def __init__(self, made: Figure, width: float, fonts: tuple[str, str]) -> None:
        super().__init__()
        self._made, self._fonts = made, fonts
        own, height = (_POINT * each for each in made.get_size_inches())
        self._scale = min(1.0, width / own)
        self.width, self.height = own * self._scale, height * self._scale

    def draw(self) -> None:
        self.canv.scale(self._scale, self._scale)
        FigureCanvasBase(self._made)
        self._made.set_dpi(_POINT)
        width, height = (_POINT * each for each in self._made.get_size_inches())
        self._made.draw(_Renderer(self.canv, width, height, self._fonts))


class _Renderer(RendererBase):
    """matplotlib's drawing calls as calls of a reportlab canvas. Both have their origin at the lower left, in points."""

    def __init__(self, canvas: Canvas, width: float, height: float, fonts: tuple[str, str]) -> None:
        super().__init__()
        self._canvas, self._size, self._fonts = canvas, (width, height), fonts

    def get_canvas_width_height(self) -> tuple[float, float]:
        return self._size

    def flipy(self) -> bool:
        return False

    def points_to_pixels(self, points: Any) -> Any:
        return points

    def get_image_magnification(self) -> float:
        return _MAGNIFIED

    def draw_path(self, gc: GraphicsContextBase, path: Path, transform: Transform, rgbFace: Any = None) -> None:  # matplotlib's name
        self._canvas.saveState()
        self._clip(gc)
        fill, stroke = rgbFace is not None, gc.get_linewidth() > 0 and gc.get_rgb()[3] > 0
        if fill:
            self._canvas.setFillColorRGB(*rgbFace[:3], alpha=_alpha(gc, rgbFace))
        if stroke:
            self._pen(gc)
        if fill or stroke:
            self._canvas.drawPath(self._path(path, transform), stroke=int(stroke), fill=int(fill))
        if gc.get_hatch():
            self._hatch(gc, path, transform)
        self._canvas.restoreState()

    def draw_image(self, gc: GraphicsContextBase, x: float, y: float, im: Any, transform: Any = None) -> None:
        height, width = (size / _MAGNIFIED for size in im.shape[:2])
        picture = Image.fromarray(np.ascontiguousarray(im[::-1]))  # rows from below
        self._canvas.saveState()
        self._clip(gc)
        self._canvas.drawImage(ImageReader(picture), x, y, width, height, mask="auto")
        self._canvas.restoreState()

    def draw_text(self, gc: GraphicsContextBase, x: float, y: float, s: str, prop: Any, angle: float, ismath: Any = False, mtext: Any = None) -> None:
        if ismath:  # powers of ten
            vertices, codes = self._text2path.get_text_path(prop, s, ismath=ismath)  # type: ignore[attr-defined]  # matplotlib's stubs leave it out
            size = prop.get_size_in_points() / self._text2path.FONT_SCALE  # type: ignore[attr-defined]
            fill = gc.get_rgb()
            gc.set_linewidth(0)
            self.draw_path(gc, Path(vertices, codes), Affine2D().scale(size).rotate_deg(angle).translate(x, y), fill)
            return
        self._canvas.saveState()
        self._clip(gc)
        self._canvas.setFillColorRGB(*gc.get_rgb()[:3], alpha=_alpha(gc, gc.get_rgb()))
        self._canvas.setFont(self._fonts[prop.get_weight() in ("bold", 700)], prop.get_size_in_points())
        self._canvas.translate(x, y)
        self._canvas.rotate(angle)
        self._canvas.drawString(0, 0, s)
        self._canvas.restoreState()

    def _path(self, path: Path, transform: Transform | None) -> Any:
        made, at = self._canvas.beginPath(), (0.0, 0.0)
        for vertices, code in path.iter_segments(transform, remove_nans=True, simplify=False):
            points = [float(each) for each in vertices]
            if code == Path.MOVETO:
                made.moveTo(*points)
            elif code == Path.LINETO:
                made.lineTo(*points)
            elif code == Path.CURVE3:  # the same curve with two control points
                (x, y), (u, v, end_x, end_y) = at, points
                made.curveTo(x + (u - x) * 2 / 3, y + (v - y) * 2 / 3, end_x + (u - end_x) * 2 / 3, end_y + (v - end_y) * 2 / 3, end_x, end_y)
            elif code == Path.CURVE4:
                made.curveTo(*points)
            elif code == Path.CLOSEPOLY:
                made.close()
                continue
            at = (points[-2], points[-1])
        return made

    def _pen(self, gc: GraphicsContextBase) -> None:
        canvas, (offset, dashes) = self._canvas, gc.get_dashes()
        canvas.setStrokeColorRGB(*gc.get_rgb()[:3], alpha=_alpha(gc, gc.get_rgb()))
        canvas.setLineWidth(gc.get_linewidth())
        canvas.setLineCap(_CAPS[str(gc.get_capstyle())])
        canvas.setLineJoin(_JOINS[str(gc.get_joinstyle())])
        canvas.setDash(np.asarray(dashes, dtype=float).tolist() if dashes is not None else [], float(offset or 0))

    def _clip(self, gc: GraphicsContextBase) -> None:
        box, clip = gc.get_clip_rectangle(), gc.get_clip_path()
        path: Any = clip[0]
        if box is not None:
            outline = self._canvas.beginPath()
            x, y, width, height = box.bounds
            outline.rect(float(x), float(y), float(width), float(height))
            self._canvas.clipPath(outline, stroke=0, fill=0)
        if path is not None:
            self._canvas.clipPath(self._path(path, clip[1]), stroke=0, fill=0)

    def _hatch(self, gc: GraphicsContextBase, path: Path, transform: Transform) -> None:
        """The hatch is a pattern in the unit square: its tiles that meet the shape, cut off at its outline."""
        pattern, box = gc.get_hatch_path(), path.get_extents(transform)
        if pattern is None or not np.isfinite(box.bounds).all():
            return
        self._canvas.clipPath(self._path(path, transform), stroke=0, fill=0)
        self._canvas.setStrokeColorRGB(*gc.get_hatch_color()[:3])
        self._canvas.setLineWidth(gc.get_hatch_linewidth())
        for column in range(int(box.x0 // _TILE), int(box.x1 // _TILE) + 1):
            for row in range(int(box.y0 // _TILE), int(box.y1 // _TILE) + 1):
                place = Affine2D().scale(_TILE).translate(column * _TILE, row * _TILE)
                self._canvas.drawPath(self._path(pattern, place), stroke=1, fill=0)


def _alpha(gc: GraphicsContextBase, colour: Any) -> float:
    return float(gc.get_alpha() if gc.get_forced_alpha() or len(colour) < 4 else colour[3])
