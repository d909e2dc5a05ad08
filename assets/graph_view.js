/* The computation graph: its layout, and what is in sight after one and when a node is chosen. Cytoscape's own handle is on its container. */
(function () {
    window.layerscope = window.layerscope || {};
    const READABLE = 0.9;  // zoom at which names can be read
    const DAGRE = { name: "dagre", rankDir: "TB", nodeSep: 14, rankSep: 26, edgeSep: 8, animate: false, fit: false };
    const wanted = { node: null, block: null };
    const handle = () => { const frame = document.getElementById("graph-canvas"); return frame && frame._cyreg && frame._cyreg.cy; };

    function centreOn(cy, found) {
        const box = found.renderedBoundingBox();
        const inside = box.x1 >= 0 && box.y1 >= 0 && box.x2 <= cy.width() && box.y2 <= cy.height();
        if (inside && cy.zoom() >= READABLE * 0.7) return;
        cy.zoom(Math.max(cy.zoom(), READABLE));
        cy.center(found);
    }

    /** After a layout: everything, if it can be read so; else the chosen node, else the top of the block that was unfolded last. */
    function settle(cy) {
        cy.scratch("settled", cy.elements().length);  // how many elements have been brought into sight
        cy.fit(undefined, 16);
        if (cy.zoom() > 1.2) { cy.zoom(1.2); cy.center(); }
        if (cy.zoom() >= READABLE * 0.85) return;
        const node = wanted.node ? cy.getElementById(wanted.node) : cy.collection();
        const block = wanted.block ? cy.getElementById(wanted.block) : cy.collection();
        if (node.length) return centreOn(cy, node);
        cy.zoom(READABLE);
        cy.center(block.length ? block : undefined);
        const box = (block.length ? block : cy.elements()).renderedBoundingBox();
        if (box.h > cy.height()) cy.panBy({ x: 0, y: 36 - box.y1 });
    }

    /** Top to bottom by dagre. Edges that run past everything are drawn but have no say: they would take most of the time and space. */
    function arrange(cy) {
        const layout = cy.elements().not(".far").layout(DAGRE);
        layout.one("layoutstop", () => settle(cy));
        layout.run();
    }

    function whenThere(act, left) {
        const cy = handle();
        if (cy) act(cy);
        else if (left) setTimeout(() => whenThere(act, left - 1), 60);
    }

    /** node: the store {value: id}; unfolded: the blocks. Runs when a node is chosen and when the elements change. */
    window.layerscope.showNode = function (node, elements, unfolded) {
        const fresh = window.dash_clientside.callback_context.triggered.some((one) => one.prop_id === "graph-canvas.elements");
        wanted.node = node && node.value ? `n${node.value}` : null;
        wanted.block = unfolded && unfolded.length ? `B${unfolded[unfolded.length - 1]}` : null;
        whenThere((cy) => {
            if (!cy.scratch("layerscope")) {
                cy.scratch("layerscope", true);
                // Dash places nothing (layout "preset") whenever elements come or go; then it is our turn.
                cy.on("layoutstop", (event) => { if (event.layout.options.name === "preset") arrange(cy); });
                if (cy.elements().length) arrange(cy);
            }
            const found = wanted.node ? cy.getElementById(wanted.node) : cy.collection();
            if (!fresh && found.length) centreOn(cy, found);
        }, 50);
        return window.dash_clientside.no_update;
    };

    document.addEventListener("click", (event) => {
        const cy = event.target.closest("[data-tool='fit-graph']") && handle();
        if (cy) cy.fit(undefined, 16);
    });
    document.addEventListener("fullscreenchange", () => { const cy = handle(); if (cy) setTimeout(() => { cy.resize(); settle(cy); }, 100); });
})();
