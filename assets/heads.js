/* The head grid: click or arrow keys choose a head; the store "chosen-head", the pickers and the grid stay equal. */
(function () {
    const grid = () => document.getElementById("head-grid");
    // Marked at once: a key that follows before Dash has answered must step from here.
    const mark = (layer, head) => {
        for (const cell of grid() ? grid().querySelectorAll(".head") : []) {
            const is = Number(cell.dataset.layer) === layer && Number(cell.dataset.head) === head;
            cell.classList.toggle("chosen", is);
            cell.setAttribute("aria-selected", String(is));
        }
        for (const row of document.querySelectorAll("tr[data-layer][data-head]")) {
            row.classList.toggle("chosen", Number(row.dataset.layer) === layer && Number(row.dataset.head) === head);
        }
    };
    const choose = (layer, head) => {
        mark(layer, head);
        window.dash_clientside.set_props("chosen-head", { data: { layer, head } });
    };

    document.addEventListener("click", (event) => {
        const cell = event.target.closest("[data-layer][data-head]");
        if (!cell) return;
        choose(Number(cell.dataset.layer), Number(cell.dataset.head));
        if (grid() && grid().contains(cell)) grid().focus({ preventScroll: true });
    });
    document.addEventListener("click", (event) => {
        const column = event.target.closest("[data-sort]");
        if (column) window.dash_clientside.set_props("head-metric", { value: column.dataset.sort });
    });
    document.addEventListener("keydown", (event) => {
        // All four keys once the grid has the focus; left and right from the page itself too, where up and down scroll.
        if (!grid() || (event.target !== grid() && event.target !== document.body)) return;
        const vertical = event.target === grid() ? { ArrowUp: [-1, 0], ArrowDown: [1, 0] } : {};
        const [down, right] = { ...vertical, ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] || [0, 0];
        if (!down && !right) return;
        event.preventDefault();
        const rows = [...grid().querySelectorAll(".head-row")].map((row) => [...row.querySelectorAll(".head")]);
        const at = rows.findIndex((row) => row.some((cell) => cell.classList.contains("chosen")));
        const column = at < 0 ? -1 : rows[at].findIndex((cell) => cell.classList.contains("chosen"));
        const next = rows[Math.max(at, 0) + (at < 0 ? 0 : down)]?.[Math.max(column, 0) + (column < 0 ? 0 : right)];
        if (next) choose(Number(next.dataset.layer), Number(next.dataset.head));
    });

    window.dash_clientside = window.dash_clientside || {};
    window.dash_clientside.layerscope = Object.assign(window.dash_clientside.layerscope || {}, {
        chooseHead(chosen, layer, head) {
            const no = window.dash_clientside.no_update;
            const by = (window.dash_clientside.callback_context.triggered || []).map((t) => t.prop_id.split(".")[0]);
            const fromPicker = by.length > 0 && !by.includes("chosen-head");
            const now = fromPicker ? { layer, head } : chosen;
            if (!now) return [no, no, no];
            mark(now.layer, now.head);
            return fromPicker ? [now, no, no] : [no, now.layer === layer ? no : now.layer, now.head === head ? no : now.head];
        },
    });
})();
