/* The head grid: click or arrow keys choose a head; the store "chosen-head", the pickers and the grid stay equal. */
(function () {
    let shown = "";  // in the pickers, as far as it came from the store
    let latest = null;  // the head that was chosen last
    const grid = () => document.getElementById("head-grid");
    // Marked at once: a key that follows before Dash has answered must step from here.
    const mark = (layer, head) => {
        latest = { layer, head };
        // Only what changes: a grid has a thousand cells.
        const chosen = (selector, on) => {
            for (const item of document.querySelectorAll(selector)) {
                item.classList.toggle("chosen", on);
                if (item.matches(".head")) item.setAttribute("aria-selected", String(on));
            }
        };
        const marked = "#head-grid .head.chosen, tr[data-layer][data-head].chosen", at = `[data-layer="${layer}"][data-head="${head}"]`;
        chosen(marked, false);
        chosen(`#head-grid .head${at}, tr${at}`, true);
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
    // What was asked for before the choice marks the head from before it.
    document.addEventListener("drawn", (event) => {
        if (latest && event.target.querySelector("tr[data-layer][data-head]")) mark(latest.layer, latest.head);
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
        /** A head was chosen: grid and pickers follow. */
        showHead(chosen) {
            if (!chosen) return [window.dash_clientside.no_update, window.dash_clientside.no_update];
            mark(chosen.layer, chosen.head);
            shown = `${chosen.layer}.${chosen.head}`;
            return [chosen.layer, chosen.head];
        },
        /** The pickers say something else than what they were told to show: a person chose with them. */
        pickHead(layer, head) {
            if (`${layer}.${head}` !== shown) choose(layer, head);
            return window.dash_clientside.no_update;
        },
    });
})();
