/* PNG, SVG and CSV of a graph, and its numbers as a table, made in the browser: nothing is sent anywhere. */
(function () {
    const MOST_ROWS = 200, MOST_COLUMNS = 40;  // of the table: more is for the CSV
    const graphOf = (id) => { const frame = document.getElementById(id); return frame && (frame.matches(".js-plotly-plot") ? frame : frame.querySelector(".js-plotly-plot")); };
    const notFinite = (value) => (Number.isNaN(value) ? "NaN" : value > 0 ? "inf" : "-inf");
    // A cell that starts with =, +, - or @ would be run as a formula by a spreadsheet: token text is not ours.
    const cell = (value) => {
        if (value === null || value === undefined) return "";
        if (typeof value === "number") return Number.isFinite(value) ? String(value) : notFinite(value);
        const text = String(value);
        const safe = /^[=+\-@\t\r]/.test(text) && Number.isNaN(Number(text)) ? `'${text}` : text;
        return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
    };
    const line = (values) => values.map(cell).join(",");
    const toCsv = (graph) => `${window.layerscope.graphBlocks(graph).map((block) => [block.header, ...block.rows].map(line).join("\n")).join("\n\n")}\n`;

    function save(name, text) {
        const link = document.createElement("a");
        link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
        link.download = name;
        link.click();
        setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    }

    function element(name, className, text, parent) {
        const made = document.createElement(name);
        if (className) made.className = className;
        if (text !== undefined) made.textContent = text;
        if (parent) parent.append(made);
        return made;
    }

    const shown = (value) => {
        if (typeof value !== "number") return value === null || value === undefined ? "" : String(value);
        return Number.isFinite(value) ? String(Number(value.toPrecision(6))) : notFinite(value);
    };

    function tableOf(block, parent) {
        const width = Math.min(block.header.length, MOST_COLUMNS + 1);
        const cut = [];
        if (block.rows.length > MOST_ROWS) cut.push(`${MOST_ROWS} of ${block.rows.length.toLocaleString("en")} rows`);
        if (block.header.length > width) cut.push(`${MOST_COLUMNS} of ${(block.header.length - 1).toLocaleString("en")} columns`);
        const size = `${block.rows.length.toLocaleString("en")} rows, ${block.header.length.toLocaleString("en")} columns.`;
        element("p", "muted small", cut.length ? `The first ${cut.join(" and ")}; the CSV has all.` : size, parent);
        const table = element("table", "ls-table compact", undefined, element("div", "table-scroll", undefined, parent));
        const numeric = block.header.map((_, j) => block.rows.length > 0 && block.rows.every((row) => typeof row[j] === "number" || row[j] === null || row[j] === undefined));
        const head = element("tr", "", undefined, element("thead", "", undefined, table));
        for (let j = 0; j < width; j++) element("th", numeric[j] ? "num" : "", shown(block.header[j]), head).scope = "col";
        const body = element("tbody", "", undefined, table);
        for (const row of block.rows.slice(0, MOST_ROWS)) {
            const line = element("tr", "", undefined, body);
            for (let j = 0; j < width; j++) {
                const text = shown(row[j]);
                const made = element(j ? "td" : "th", numeric[j] ? "num" : text.length > 40 ? "long" : "nowrap", text, line);
                if (!j) made.scope = "row";
            }
        }
    }

    /** A dialog of the browser's own: Escape closes it, the keyboard stays inside it, and the focus goes back to the button. */
    function showTable(graph, button, name) {
        const dialog = element("dialog", "graph-table", undefined, document.body);
        const title = button.closest(".ls-card")?.querySelector(".card-title")?.textContent || name;
        const head = element("div", "card-head", undefined, dialog);
        element("h2", "card-title", `${title}, as a table`, head);
        const close = element("button", "btn btn-outline-secondary", "Close", head);
        const blocks = window.layerscope.graphBlocks(graph);
        const body = element("div", "graph-table-body", undefined, dialog);
        body.tabIndex = 0;
        body.setAttribute("role", "region");
        body.setAttribute("aria-label", title);
        for (const block of blocks) tableOf(block, body);
        if (!blocks.length) element("p", "muted", "There is nothing drawn to list.", body);
        close.addEventListener("click", () => dialog.close());
        dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
        dialog.addEventListener("close", () => { dialog.remove(); button.focus(); });
        dialog.showModal();
    }

    document.addEventListener("click", (event) => {
        const tool = event.target.closest("[data-tool][data-graph]");
        const graph = tool && graphOf(tool.dataset.graph);
        if (!graph) return;
        const { tool: kind, name } = tool.dataset;
        if (kind === "csv") save(`${name}.csv`, toCsv(graph));
        else if (kind === "table") showTable(graph, tool, name);
        else window.Plotly.downloadImage(graph, { format: kind, filename: name, scale: kind === "png" ? 2 : 1 });
    });
})();
