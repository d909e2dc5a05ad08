/* What a point cloud is drawn with besides its points: two pens with the same strokes, one for a canvas and one for an SVG file, and the axes,
   paths, marks and legend that both draw. Text is drawn, never parsed as markup. */
(function () {
    window.layerscope = window.layerscope || {};
    const FONT = '"Inter Variable", system-ui, sans-serif';
    const MONO = '"JetBrains Mono Variable", ui-monospace, monospace';
    const PAD = 10;

    class CanvasPen {
        constructor(context) { this.context = context; }
        line(points, colour, width, opacity = 1) {
            const c = this.context;
            c.save();
            c.globalAlpha = opacity; c.strokeStyle = colour; c.lineWidth = width; c.lineJoin = "round";
            c.beginPath();
            points.forEach(([x, y], i) => (i ? c.lineTo(x, y) : c.moveTo(x, y)));
            c.stroke();
            c.restore();
        }
        circle(x, y, r, fill, stroke, width = 1.5, opacity = 1) {
            const c = this.context;
            c.save();
            c.globalAlpha = opacity;
            c.beginPath(); c.arc(x, y, r, 0, 2 * Math.PI);
            if (fill) { c.fillStyle = fill; c.fill(); }
            if (stroke) { c.strokeStyle = stroke; c.lineWidth = width; c.stroke(); }
            c.restore();
        }
        rect(x, y, w, h, fill) { this.context.fillStyle = fill; this.context.fillRect(x, y, w, h); }
        text(x, y, words, { colour, size = 11, align = "left", mono = false, turn = 0, halo = null }) {
            const c = this.context;
            c.save();
            c.translate(x, y); c.rotate((turn * Math.PI) / 180);
            c.font = `${size}px ${mono ? MONO : FONT}`; c.textAlign = align; c.textBaseline = "middle";
            if (halo) { c.strokeStyle = halo; c.lineWidth = 3; c.lineJoin = "round"; c.strokeText(words, 0, 0); }
            c.fillStyle = colour; c.fillText(words, 0, 0);
            c.restore();
        }
        image(canvas, x, y, w, h) { this.context.drawImage(canvas, x, y, w, h); }
    }

    class SvgPen {
        constructor() { this.parts = []; }
        static plain(words) { return String(words).replace(/[&<>"]/g, (char) => `&#${char.charCodeAt(0)};`).replace(/[^\t\n\r\x20-\uD7FF\uE000-\uFFFD\u{10000}-\u{10FFFF}]/gu, "\uFFFD"); }
        line(points, colour, width, opacity = 1) {
            const path = points.map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`).join(" ");
            this.parts.push(`<polyline points="${path}" fill="none" stroke="${colour}" stroke-width="${width}" stroke-opacity="${opacity}" stroke-linejoin="round"/>`);
        }
        circle(x, y, r, fill, stroke, width = 1.5, opacity = 1) {
            this.parts.push(`<circle cx="${x.toFixed(1)}" cy="${y.toFixed(1)}" r="${r.toFixed(1)}" fill="${fill || "none"}"`
                + (stroke ? ` stroke="${stroke}" stroke-width="${width}"` : "") + (opacity < 1 ? ` opacity="${opacity}"` : "") + "/>");
        }
        rect(x, y, w, h, fill) { this.parts.push(`<rect x="${x}" y="${y}" width="${w}" height="${h}" fill="${fill}"/>`); }
        text(x, y, words, { colour, size = 11, align = "left", mono = false, turn = 0, halo = null }) {
            const anchor = { left: "start", center: "middle", right: "end" }[align];
            const around = halo ? ` stroke="${halo}" stroke-width="3" paint-order="stroke" stroke-linejoin="round"` : "";
            this.parts.push(`<text x="${x.toFixed(1)}" y="${y.toFixed(1)}" dy="0.35em" fill="${colour}" font-size="${size}" font-family="${SvgPen.plain(mono ? MONO : FONT)}" `
                + `text-anchor="${anchor}"${turn ? ` transform="rotate(${turn} ${x.toFixed(1)} ${y.toFixed(1)})"` : ""}${around} xml:space="preserve">${SvgPen.plain(words)}</text>`);
        }
        image(canvas, x, y, w, h) { this.parts.push(`<image x="${x}" y="${y}" width="${w}" height="${h}" href="${canvas.toDataURL("image/png")}"/>`); }
        done(width, height) { return `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}">${this.parts.join("")}</svg>\n`; }
    }

    /** Round numbers inside low..high, about `most` of them. */
    function ticks(low, high, most) {
        const raw = (high - low) / Math.max(most, 1);
        if (!(raw > 0) || !Number.isFinite(raw)) return [];
        const power = 10 ** Math.floor(Math.log10(raw));
        const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw);
        const found = [];
        for (let i = Math.ceil(low / step); i * step <= high; i++) found.push(i * step);
        return found;
    }
    const number = (value) => (Math.abs(value) < 1e-12 ? "0" : String(Number(value.toPrecision(4))).replace("-", "\u2212"));

    /** Grid, tick labels and axis titles; in three dimensions the box of the points with a title along one edge of each axis. */
    function furniture(pen, cloud) {
        const { width, height, theme, axes } = cloud;
        if (cloud.dims === 3) return box(pen, cloud);
        const { left, bottom, right, top } = cloud.margins;
        const [x0, y1] = cloud.unproject(left, top), [x1, y0] = cloud.unproject(width - right, height - bottom);
        for (const value of ticks(x0, x1, (width - left - right) / 110)) {
            const [x] = cloud.project2(value, 0);
            pen.line([[x, top], [x, height - bottom]], theme.line, value === 0 ? 1.4 : 0.8);
            pen.text(x, height - bottom + 13, number(value), { colour: theme.quiet, align: "center" });
        }
        for (const value of ticks(y0, y1, (height - top - bottom) / 80)) {
            const [, y] = cloud.project2(0, value);
            pen.line([[left, y], [width - right, y]], theme.line, value === 0 ? 1.4 : 0.8);
            pen.text(left - 7, y, number(value), { colour: theme.quiet, align: "right" });
        }
        pen.text((left + width - right) / 2, height - 10, axes[0], { colour: theme.soft, size: 12, align: "center" });
        pen.text(12, (top + height - bottom) / 2, axes[1], { colour: theme.soft, size: 12, align: "center", turn: -90 });
    }

    function box(pen, cloud) {
        const { low, high, theme, axes } = cloud;
        const corner = (bits) => cloud.project3([0, 1, 2].map((a) => (bits >> a & 1 ? high[a] : low[a])));
        const middle = cloud.project3(low.map((value, a) => (value + high[a]) / 2));
        for (let a = 0; a < 3; a++) {
            const edges = [0, 1, 2, 3, 4, 5, 6, 7].filter((bits) => !(bits >> a & 1)).map((bits) => [corner(bits), corner(bits | 1 << a)]);
            edges.forEach((edge) => pen.line(edge, theme.edge, 0.8, 0.7));
            // Named where nothing lies before it: the lowest of the edges along the floor, the leftmost upright one.
            const at = ([from, to]) => [(from[0] + to[0]) / 2, (from[1] + to[1]) / 2];
            const outer = edges.reduce((best, edge) => ((a < 2 ? at(edge)[1] > at(best)[1] : at(edge)[0] < at(best)[0]) ? edge : best));
            const [x, y] = at(outer), away = Math.hypot(x - middle[0], y - middle[1]) || 1, side = x < middle[0];
            pen.line(outer, theme.soft, 1.3);
            pen.text(x + (18 * (x - middle[0])) / away, y + (18 * (y - middle[1])) / away, axes[a], { colour: theme.soft, size: 12, align: side ? "right" : "left", halo: theme.surface });
        }
    }

    /** What lies over the points: paths through layers, marked points with their labels, the chosen and the hovered one. */
    function above(pen, cloud) {
        const { theme, overlay } = cloud;
        for (const path of overlay.paths || []) {
            const places = path.points.map((i) => cloud.place(i));
            pen.line(places, path.strong ? theme.accent : theme.soft, path.strong ? 2.2 : 0.8, path.strong ? 0.95 : 0.35);
            if (!path.strong) continue;
            places.forEach(([x, y]) => pen.circle(x, y, 2.6, theme.accent, theme.surface, 1));
            for (const [at, words] of path.labels || []) if (path.points[at] !== overlay.chosen) label(pen, cloud, places[at], words);
        }
        const taken = [];
        for (const mark of overlay.marks || []) {
            const [x, y] = cloud.place(mark.i);
            pen.circle(x, y, 5.5, null, theme.strong, 2);
            if (mark.label && cloud.inside(x, y)) {
                const w = mark.label.length * 7.2 + 16;
                if (!taken.some((t) => x < t.x + t.w && t.x < x + w && Math.abs(y - t.y) < 14)) { taken.push({ x, y, w }); label(pen, cloud, [x, y], mark.label); }
            }
        }
        for (const [i, width] of [[overlay.chosen, 2.4], [cloud.hovered, 1.6]]) {
            if (i === null || i === undefined || i < 0) continue;
            const [x, y] = cloud.place(i);
            pen.circle(x, y, 8, null, theme.accent, width);
        }
        if (overlay.chosen !== null && overlay.chosen !== undefined && overlay.chosen >= 0) label(pen, cloud, cloud.place(overlay.chosen), cloud.label(overlay.chosen), 11);
    }

    function label(pen, cloud, [x, y], words, away = 9) {
        const short = words.length > 28 ? `${words.slice(0, 27)}\u2026` : words;
        const end = x > cloud.width - 120;
        pen.text(x + (end ? -away : away), y, short, { colour: cloud.theme.strong, size: 12, mono: true, align: end ? "right" : "left", halo: cloud.theme.surface });
    }

    /** The legend under a saved picture: classes with their colours, or a scale. Gives the height it takes. */
    function legend(pen, cloud, top) {
        const { legend: found, palette } = cloud.colours, t = cloud.theme;
        let x = PAD, y = top + 12;
        if (found.kind === "scale") {
            const w = 160;
            for (let i = 0; i < w; i++) pen.rect(x + i, y - 4, 1.5, 8, palette[Math.round((i / (w - 1)) * (found.n - 1))]);
            pen.text(x + w + PAD, y, `${found.title}: ${found.low} to ${found.high}`, { colour: t.soft, size: 12 });
            return 24;
        }
        for (const { colour, words } of found.items) {
            const w = 24 + words.length * 7;
            if (x + w > cloud.width) { x = PAD; y += 18; }
            pen.circle(x + 5, y, 4.5, colour);
            pen.text(x + 15, y, words, { colour: t.soft, size: 12 });
            x += w;
        }
        return y - top + 14;
    }

    Object.assign(window.layerscope, { cloudPens: { CanvasPen, SvgPen, furniture, above, legend } });
})();
