/* The MoE page in the browser: what a cell of a map says, from the names in the figure's meta. Written into every cell they would be most of a figure. */
(function () {
    const plot = (id) => document.querySelector(`#${id} .js-plotly-plot`);
    const share = (value) => (Number.isFinite(value) ? `, ${(100 * value).toFixed(1)}%` : "");
    const says = {
        "moe-map": (here, z) => [here],
        "moe-probs": (here, z) => [`router probability ${Number(z).toFixed(4)}`],
        "moe-together": (here, z) => [`${here.toLocaleString("en")} tokens${share(z)}`],
        "moe-next": (here, z) => [`${here.toLocaleString("en")} tokens${share(z)}`],
    };

    window.dash_clientside = window.dash_clientside || {};
    window.dash_clientside.layerscope = Object.assign(window.dash_clientside.layerscope || {}, {
        moeView(layer, position, theme, shown) {
            const view = { layer, position: position ?? shown.position, theme: theme || shown.theme };
            return Object.keys(view).every((key) => view[key] === shown[key]) ? window.dash_clientside.no_update : view;
        },
        /** Says, once the first cards have been painted, that there is time for the others. */
        moeSeen(_, begun) {
            const said = () => [Date.now(), begun ? window.dash_clientside.no_update : true];
            return new Promise((resolve) => requestAnimationFrame(() => requestIdleCallback(() => resolve(said()), { timeout: 1000 })));
        },
        /** A cell of a map was clicked: its layer, and its token where the map has tokens. */
        moeOpen(load, map) {
            const by = (window.dash_clientside.callback_context.triggered || []).map((each) => each.prop_id.split(".")[0])[0];
            const click = by === "moe-load" ? load : map, graph = by && plot(by), point = click && click.points && click.points[0];
            if (point && graph && graph.layout.meta) {
                const { meta } = graph.layout;
                window.dash_clientside.set_props("moe-layer", { value: Number(meta.y[point.y].slice(1)) });
                if (by === "moe-map") window.dash_clientside.set_props("position", { data: parseInt(meta.x[point.x], 10) });
            }
            return window.dash_clientside.no_update;
        },
        moeTip(...hovers) {
            const { tip } = window.layerscope, no = window.dash_clientside.no_update;
            const by = (window.dash_clientside.callback_context.triggered || []).map((each) => each.prop_id.split(".")[0])[0];
            const hover = hovers[Object.keys(says).indexOf(by)], graph = by && plot(by), point = hover && hover.points && hover.points[0];
            if (!point || !graph || !graph.layout.meta) { tip.hide(); return no; }
            const { meta } = graph.layout, cells = graph._fullData[0], here = cells.customdata && cells.customdata[point.y][point.x];
            tip.show([`${tip.plain(meta.y[point.y])}, ${tip.plain(meta.x[point.x])}`, ...says[by](here, cells.z[point.y][point.x])]);
            return no;
        },
    });
})();
