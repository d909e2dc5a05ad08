/* A point cloud as PNG, SVG or CSV, made in the browser: nothing is sent anywhere. */
(function () {
    window.layerscope = window.layerscope || {};
    const SVG_POINTS = 20000;  // more go into an SVG file as one picture
    const LEGEND = 80;  // pixels that are kept for the legend under the picture

    /** The picture as it is shown, its legend under it, by one of the pens; its height. */
    function picture(cloud, pen) {
        const { furniture, above, legend } = window.layerscope.cloudPens;
        const hovered = cloud.hovered;
        cloud.hovered = -1;
        pen.rect(0, 0, cloud.width, cloud.height + LEGEND, cloud.theme.surface);
        furniture(pen, cloud);
        if (pen.parts && cloud.n <= SVG_POINTS && cloud.dims === 2) cloud.dots(pen);
        else { cloud.drawPoints(); pen.image(cloud.points, 0, 0, cloud.width, cloud.height); }
        above(pen, cloud);
        cloud.hovered = hovered;
        return cloud.height + (cloud.colours ? legend(pen, cloud, cloud.height) : 0);
    }

    /** One line a point: coordinates, its text, and what its hover tells. Text that a spreadsheet would run as a formula gets an apostrophe. */
    function csv(cloud) {
        const cell = (value) => { const text = typeof value === "string" && /^[=+\-@\t\r]/.test(value) ? `'${value}` : String(value); return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text; };
        const lines = [[...cloud.axes.slice(0, cloud.dims), "text", ...cloud.fields.map((field) => field.name)].map(cell).join(",")];
        for (let i = 0; i < cloud.n; i++) {
            const told = cloud.fields.map((field) => (field.words ? field.words[field.values[i]] ?? "" : field.values[i]));
            lines.push([...cloud.at.subarray(3 * i, 3 * i + cloud.dims), cloud.label(i), ...told].map(cell).join(","));
        }
        return `${lines.join("\n")}\n`;
    }

    function png(cloud) {
        const whole = document.createElement("canvas"), cut = document.createElement("canvas");
        [whole.width, whole.height] = [2 * cloud.width, 2 * (cloud.height + LEGEND)];
        const context = whole.getContext("2d");
        context.setTransform(2, 0, 0, 2, 0, 0);
        const height = picture(cloud, new window.layerscope.cloudPens.CanvasPen(context));
        [cut.width, cut.height] = [whole.width, Math.min(2 * height, whole.height)];
        cut.getContext("2d").drawImage(whole, 0, 0);
        return cut;
    }

    function give(blob, name) {
        const link = document.createElement("a");
        link.href = URL.createObjectURL(blob);
        link.download = name;
        link.click();
        setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    }

    /** kind: png, svg or csv. */
    window.layerscope.saveCloud = function (cloud, kind, name) {
        if (!cloud.n) return;
        if (kind === "csv") give(new Blob([csv(cloud)], { type: "text/csv" }), `${name}.csv`);
        else if (kind === "png") png(cloud).toBlob((blob) => give(blob, `${name}.png`));
        else {
            const pen = new window.layerscope.cloudPens.SvgPen();
            const height = picture(cloud, pen);
            give(new Blob([pen.done(cloud.width, height)], { type: "image/svg+xml" }), `${name}.svg`);
        }
    };
})();
