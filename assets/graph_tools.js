/* PNG, SVG and CSV of a graph, made in the browser: nothing is sent anywhere. */
(function () {
    const graphOf = (id) => { const frame = document.getElementById(id); return frame && (frame.matches(".js-plotly-plot") ? frame : frame.querySelector(".js-plotly-plot")); };
    // A cell that starts with =, +, - or @ would be run as a formula by a spreadsheet: token text is not ours.
    const cell = (value) => {
        if (value === null || value === undefined) return "";
        if (typeof value === "number") return Number.isFinite(value) ? String(value) : "";
        const text = String(value);
        const safe = /^[=+\-@\t\r]/.test(text) && Number.isNaN(Number(text)) ? `'${text}` : text;
        return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
    };
    const plain = (text) => text.replaceAll("&lt;", "<").replaceAll("&gt;", ">").replaceAll("&amp;", "&");
    const line = (values) => values.map(cell).join(",");
    const list = (values) => Array.from(values || []);

    function labels(axis, positions) {
        const words = axis && axis.ticktext ? new Map(list(axis.tickvals).map((value, i) => [Number(value), axis.ticktext[i]])) : new Map();
        return list(positions).map((position) => words.get(Number(position)) ?? position);
    }

    function toCsv(graph) {
        const rows = [];
        graph._fullData.forEach((trace, n) => {
            if (n) rows.push("");
            if (trace.z) {
                const z = list(trace.z).map(list);
                const width = z.length ? z[0].length : 0;
                const x = trace.x ? list(trace.x) : [...Array(width).keys()];
                const y = trace.y ? list(trace.y) : [...z.keys()];
                const meta = graph.layout.meta || {};  // a pattern names its rows and columns there, and says whether its colours are square roots
                rows.push(line(["", ...(meta.columns ? meta.columns.map(plain) : labels(graph.layout.xaxis, x))]));
                const names = meta.rows ? meta.rows.map(plain) : labels(graph.layout.yaxis, y);
                z.forEach((row, i) => rows.push(line([names[i], ...(meta.sqrt ? row.map((value) => value * value) : row)])));
            } else if (trace.x && trace.y) {
                rows.push(line(["x", trace.name || "y"]));
                const y = list(trace.y);
                list(trace.x).forEach((value, i) => rows.push(line([value, y[i]])));
            }
        });
        return rows.join("\n") + "\n";
    }

    function save(name, text) {
        const link = document.createElement("a");
        link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
        link.download = name;
        link.click();
        setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    }

    document.addEventListener("click", (event) => {
        const tool = event.target.closest("[data-tool][data-graph]");
        const graph = tool && graphOf(tool.dataset.graph);
        if (!graph) return;
        const { tool: kind, name } = tool.dataset;
        if (kind === "csv") save(`${name}.csv`, toCsv(graph));
        else window.Plotly.downloadImage(graph, { format: kind, filename: name, scale: kind === "png" ? 2 : 1 });
    });
})();
