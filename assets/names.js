/* Names for the dropdowns and check lists of Dash, which say their value alone ("Linear"): the label they stand in or that points at them, else
   the title of their card, is put before it. References, not copies, so that a title that changes is the name. */
(function () {
    let number = 0;
    const identified = (element) => { if (!element.id) element.id = `name-${(number += 1)}`; return element.id; };

    function labelOf(control) {
        const around = control.closest("label");
        if (around) return [...around.children].find((child) => child.tagName === "SPAN" && !child.contains(control));
        const pointing = control.id && document.querySelector(`label[for="${CSS.escape(control.id)}"]`);
        return pointing || control.closest(".ls-card")?.querySelector(".card-title") || document.querySelector("h1");
    }

    function name() {
        for (const control of document.querySelectorAll("button.dash-dropdown:not([data-named]), .dash-checklist[role=listbox]:not([data-named])")) {
            const label = labelOf(control);
            if (!label) continue;
            control.dataset.named = "";
            control.setAttribute("aria-labelledby", [identified(label), control.getAttribute("aria-labelledby")].filter(Boolean).join(" "));
        }
    }

    let waiting = false;
    new MutationObserver(() => {
        if (waiting) return;
        waiting = true;
        requestAnimationFrame(() => { waiting = false; name(); });
    }).observe(document.documentElement, { childList: true, subtree: true });
})();
