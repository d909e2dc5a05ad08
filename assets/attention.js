/* The Attention page in the browser: what a cell of a pattern says, the range that is zoomed to, the pinned head, strips of tokens. */
(function () {
    const plot = (id) => document.querySelector(`#${id} .js-plotly-plot`);
    const plain = (text) => text.replaceAll("&lt;", "<").replaceAll("&gt;", ">").replaceAll("&amp;", "&");
    let tip = null, mouse = [0, 0];
    document.addEventListener("mousemove", (event) => { mouse = [event.clientX, event.clientY]; }, { passive: true });

    function hide() { if (tip) { tip.remove(); tip = null; } }
    function show(lines) {
        hide();
        tip = document.createElement("div");
        tip.className = "tip";
        tip.setAttribute("role", "tooltip");
        for (const line of lines) { const row = document.createElement("div"); row.textContent = line; tip.append(row); }
        document.body.append(tip);
        tip.style.left = `${Math.max(8, Math.min(mouse[0] + 14, window.innerWidth - tip.offsetWidth - 8))}px`;
        tip.style.top = `${Math.max(8, Math.min(mouse[1] + 16, window.innerHeight - tip.offsetHeight - 8))}px`;
    }
    const nearest = (places, at) => { let best = 0; for (let i = 1; i < places.length; i++) if (Math.abs(places[i] - at) < Math.abs(places[best] - at)) best = i; return best; };

    window.addEventListener("scroll", hide, { passive: true, capture: true });
    window.layerscope = Object.assign(window.layerscope || {}, { tip: { show, hide, plain } });

    window.dash_clientside = window.dash_clientside || {};
    window.dash_clientside.layerscope = Object.assign(window.dash_clientside.layerscope || {}, {
        /** The tip of the cell under the pointer: two tokens and the value, from the figure's meta. */
        patternTip(pattern, pinned) {
            const no = window.dash_clientside.no_update;
            const by = (window.dash_clientside.callback_context.triggered || []).map((t) => t.prop_id.split(".")[0])[0];
            const hover = by === "pinned" ? pinned : pattern;
            const graph = plot(by);
            const point = hover && hover.points && hover.points[0];
            if (!point || !graph || !graph.layout.meta) { hide(); return no; }
            const { meta } = graph.layout, cells = graph._fullData[0];
            const value = meta.sqrt ? point.z * point.z : point.z;
            show([plain(meta.y[nearest(cells.y, point.y)]), `looks at ${plain(meta.x[nearest(cells.x, point.x)])}`, `${meta.unit} ${Number(value).toPrecision(4)}`]);
            return no;
        },
        /** A range was dragged, or the whole prompt asked for: the positions in sight, or null. */
        zoomPattern(relayout, reset, before) {
            const no = window.dash_clientside.no_update;
            const by = (window.dash_clientside.callback_context.triggered || []).map((t) => t.prop_id);
            if (by.includes("pattern-reset.n_clicks")) return before ? null : no;
            const keys = Object.keys(relayout || {});
            if (keys.some((key) => key.endsWith("autorange"))) return before ? null : no;
            const graph = plot("pattern");
            if (!keys.some((key) => key.includes("range")) || !graph || !graph.layout.meta) return no;
            const n = graph.layout.meta.n;
            const cut = (range) => {
                const [low, high] = [Math.min(...range), Math.max(...range)];
                const first = Math.min(Math.max(Math.ceil(low - 0.25), 0), n - 2);
                return [first, Math.min(Math.max(Math.floor(high + 0.25) + 1, first + 2), n)];
            };
            const now = [...cut(graph._fullLayout.yaxis.range), ...cut(graph._fullLayout.xaxis.range)];
            if (now[0] === 0 && now[2] === 0 && now[1] === n && now[3] === n) return before ? null : no;
            return before && now.every((place, i) => place === before[i]) ? no : now;
        },
        /** Another head was chosen: the heatmap's frame moves to it. */
        frameHead(chosen) {
            const graph = plot("metric-heads");
            const layers = graph && graph.layout && graph.layout.meta && graph.layout.meta.layers;
            const row = layers && chosen ? layers.indexOf(chosen.layer) : -1;
            if (row >= 0 && graph.layout.shapes && graph.layout.shapes.length) {
                const place = { "shapes[0].x0": chosen.head - 0.5, "shapes[0].x1": chosen.head + 0.5, "shapes[0].y0": row - 0.5, "shapes[0].y1": row + 0.5 };
                requestIdleCallback(() => { if (graph.isConnected && graph.layout) window.Plotly.relayout(graph, place); }, { timeout: 400 });  // the pattern comes first
            }
            return window.dash_clientside.no_update;
        },
        /** Whether the pinned head has to be drawn: a new request, or nothing. */
        askPinned(chosen, of, view, first, scale, window_, pinned) {
            const no = window.dash_clientside.no_update, pane = document.getElementById("pinned-pane");
            if (!pane || (!pinned && pane.hidden)) return no;
            const by = (window.dash_clientside.callback_context.triggered || []).map((t) => t.prop_id);
            const shown = document.getElementById("pinned-title").textContent === `Pinned: ${pinned && pinned.name}`;
            return shown && view === "pattern" && by.length === 1 && by[0] === "chosen-head.data" ? no : Date.now();
        },
        /** Pin the chosen head, or unpin. */
        pinHead(pin, unpin, chosen) {
            const by = (window.dash_clientside.callback_context.triggered || []).map((t) => t.prop_id);
            if (by.includes("unpin-head.n_clicks")) return null;
            return pin && chosen ? { ...chosen, name: `${chosen.layer}.${chosen.head}` } : window.dash_clientside.no_update;
        },
    });

    document.addEventListener("click", (event) => {
        const token = event.target.closest(".attention-strip [data-at]");
        if (token) window.dash_clientside.set_props("position", { data: Number(token.dataset.at) });
    });
})();
