/* Names for what would say too little to someone who does not see the page. Dash's dropdowns and check lists say their value alone ("Linear"), a grid
   says nothing: the label they stand in or that points at them, else the title of their card, is put before it. The tools of a card ("About", "PNG")
   are the same on every card: its title is put after them. References, not copies, so that a title that changes is the name. */
(function () {
    const CHOICES = "button.dash-dropdown:not([data-named]), .dash-checklist[role=listbox]:not([data-named]), .ag-root[role=grid]:not([data-named])";
    const TOOLS = ".card-tools .tool:not([data-named])";
    let number = 0;
    const identified = (element) => { if (!element.id) element.id = `name-${(number += 1)}`; return element.id; };
    const titleOf = (element) => element.closest(".ls-card")?.querySelector(".card-title");

    function labelOf(control) {
        const around = control.closest("label");
        if (around) return [...around.children].find((child) => child.tagName === "SPAN" && !child.contains(control));
        const pointing = control.id && document.querySelector(`label[for="${CSS.escape(control.id)}"]`);
        return pointing || titleOf(control) || document.querySelector("h1");
    }

    function reference(element, ids) {
        element.dataset.named = "";
        element.setAttribute("aria-labelledby", ids.filter(Boolean).join(" "));
    }

    function name() {
        for (const control of document.querySelectorAll(CHOICES)) {
            const label = labelOf(control);
            if (label) reference(control, [identified(label), control.getAttribute("aria-labelledby")]);
        }
        for (const tool of document.querySelectorAll(TOOLS)) {
            const title = titleOf(tool);
            if (title) reference(tool, [identified(tool), identified(title)]);
        }
    }

    let waiting = false;
    new MutationObserver(() => {
        if (waiting) return;
        waiting = true;
        requestAnimationFrame(() => { waiting = false; name(); });
    }).observe(document.documentElement, { childList: true, subtree: true });
})();
