/* The Logits page's choice of what colours the token strip, and the strip's own menu, say the same. */
(function () {
    const menu = () => document.getElementById("strip-metric");
    document.addEventListener("change", (event) => {
        if (event.target.id === "strip-metric" && document.getElementById("logits-colour")) window.dash_clientside.set_props("logits-colour", { value: event.target.value });
    });
    window.dash_clientside = window.dash_clientside || {};
    window.dash_clientside.layerscope = Object.assign(window.dash_clientside.layerscope || {}, {
        colourStrip(metric) {
            if (menu() && metric && menu().value !== metric) {
                menu().value = metric;
                menu().dispatchEvent(new Event("change", { bubbles: true }));
            }
            return window.dash_clientside.no_update;
        },
    });
})();
