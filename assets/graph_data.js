/* What a graph shows, as rows: the one source of its CSV and of its table. Blocks {header, rows}; one for each trace, and for a heatmap
   that has words in its cells or hovers one more for each. Figures name the places of their axes in layout.meta, {x: [...], y: [...]},
   since the axis itself writes only as many as there is room for; a pattern's hovers are made from them too (attention.js). */
(function () {
    window.layerscope = window.layerscope || {};
    const list = (values) => (values === null || values === undefined ? [] : Array.from(values));
    const isArray = (values) => Array.isArray(values) || ArrayBuffer.isView(values);
    const decoder = document.createElement("textarea");

    /** Plotly's pseudo-HTML as plain text: line breaks become " | ", other tags go, entities are taken apart. */
    function plain(value) {
        if (typeof value !== "string" || !/[<&]/.test(value)) return value;
        decoder.innerHTML = value.replace(/<br\s*\/?>/gi, " | ").replace(/<\/?(b|i|sub|sup|span|em|a)\b[^>]*>/gi, "");
        return decoder.value;
    }

    const said = (value) => (isArray(value) ? list(value).map(plain).join(" | ") : plain(value));

    /** The name of each position of an axis: from the figure's own list, else the words of the ticks that stand there. */
    function named(graph, letter, axis, positions) {
        const names = graph.layout.meta && graph.layout.meta[letter];
        const words = new Map(axis && axis.ticktext ? list(axis.tickvals).map((value, i) => [String(value), axis.ticktext[i]]) : []);
        return list(positions).map((position, i) => plain((names && names[i]) ?? words.get(String(position)) ?? position));
    }

    // Titles come from the figure itself: the full layout fills in an invitation to write one.
    const axisOf = (graph, trace, letter, layout = graph._fullLayout) => layout[`${letter}axis${(trace[`${letter}axis`] || letter).slice(1)}`] || {};
    const titleOf = (axis, otherwise) => plain(axis.title && (axis.title.text ?? axis.title)) || otherwise;

    function matrix(graph, trace) {
        const z = list(trace.z).map(list);
        const width = z.length ? z[0].length : 0;
        const x = named(graph, "x", axisOf(graph, trace, "x"), trace.x ? list(trace.x).slice(0, width) : [...Array(width).keys()]);
        const y = named(graph, "y", axisOf(graph, trace, "y"), trace.y ? list(trace.y).slice(0, z.length) : [...z.keys()]);
        const block = (corner, cell) => ({ header: [corner, ...x], rows: z.map((row, i) => [y[i], ...row.map((value, j) => cell(value, i, j))]) });
        const { sqrt, unit } = graph.layout.meta || {};  // a pattern says whether its colours are square roots: the values are what is wanted
        const found = [block(trace._input.name || unit || "", (value) => (sqrt && typeof value === "number" ? value * value : value))];
        if (isArray(trace.text)) found.push(block("text", (_, i, j) => plain((trace.text[i] || [])[j])));
        if (isArray(trace.customdata)) found.push(block("hover", (_, i, j) => said((trace.customdata[i] || [])[j])));
        return found;
    }

    function points(graph, trace) {
        const across = trace.orientation === "h" && trace.type === "bar" ? ["y", "x"] : ["x", "y"];
        const letters = trace.z && trace.type.endsWith("3d") ? ["x", "y", "z"] : across;
        const scene = trace.type.endsWith("3d") ? graph.layout[trace.scene || "scene"] || {} : null;
        const axes = letters.map((letter) => (scene ? scene[`${letter}axis`] || {} : axisOf(graph, trace, letter, graph.layout)));
        const columns = letters.map((letter, i) => {
            const last = i === letters.length - 1;
            return [last && !scene && trace._input.name ? plain(trace._input.name) : titleOf(axes[i], letter), list(trace[letter])];
        });
        if (!scene) {
            const names = named(graph, letters[0], axes[0], columns[0][1]);
            if (names.some((name, i) => name !== columns[0][1][i])) columns.splice(1, 0, ["label", names]);
        }
        const n = columns[0][1].length;
        if (isArray(trace.text)) columns.push(["text", list(trace.text).map(plain)]);
        const label = (columns.find(([name]) => name === "label") || [])[1];
        const hovers = isArray(trace.customdata) ? list(trace.customdata).map(said) : [];
        if (hovers.some((words, i) => !label || words !== label[i])) columns.push(["hover", hovers]);
        else if (isArray(trace.hovertext)) columns.push(["hover", list(trace.hovertext).map(plain)]);
        const colour = trace.marker && trace.marker.color;
        if (isArray(colour) && list(colour).every((value) => typeof value === "number")) columns.push(["colour", list(colour)]);
        const group = scene && trace._input.name ? [["group", Array(n).fill(plain(trace._input.name))]] : [];
        const all = [...group, ...columns];
        return [{ header: all.map(([name]) => name), rows: [...Array(n).keys()].map((i) => all.map(([, values]) => values[i])) }];
    }

    window.layerscope.graphBlocks = (graph) =>
        graph._fullData.filter((trace) => trace.visible === true).flatMap((trace) => {
            if (trace.z && !trace.type.endsWith("3d")) return matrix(graph, trace);
            return trace.x && trace.y ? points(graph, trace) : [];
        });
})();
