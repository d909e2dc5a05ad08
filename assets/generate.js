/* Generate: what each written token could have been, on hover and from the keyboard; a click or the arrow keys choose a step. */
(function () {
    const text = () => document.getElementById("live-text");
    const tokens = () => [...text().querySelectorAll(".tok.written")];
    let tip = null;
    const hideTip = () => { if (tip) { tip.remove(); tip = null; } };

    function showTip(token) {
        hideTip();
        tip = document.createElement("div");
        tip.className = "tip";
        tip.setAttribute("role", "tooltip");
        const [head, ...lines] = token.dataset.tip.split("\n");
        const name = document.createElement("b");
        name.textContent = head;
        const rest = document.createElement("div");
        rest.className = "tip-list";
        rest.textContent = lines.join("\n");
        tip.append(name, rest);
        document.body.append(tip);
        const box = token.getBoundingClientRect();
        const below = box.bottom + 8 + tip.offsetHeight < window.innerHeight;
        tip.style.left = `${Math.max(8, Math.min(box.left, window.innerWidth - tip.offsetWidth - 8))}px`;
        tip.style.top = `${below ? box.bottom + 8 : Math.max(8, box.top - 8 - tip.offsetHeight)}px`;
    }

    function mark(step) {
        for (const token of tokens()) {
            const is = Number(token.dataset.step) === step;
            token.classList.toggle("chosen", is);
            token.setAttribute("aria-selected", String(is));
            if (is) token.scrollIntoView({ block: "nearest" });
        }
    }

    function choose(step) {
        mark(step);
        if (document.getElementById("gen-step")) window.dash_clientside.set_props("gen-step", { value: step });
    }

    document.addEventListener("mouseover", (event) => {
        const token = event.target.closest("#live-text .tok.written");
        if (token) showTip(token); else if (!event.target.closest(".tip")) hideTip();
    });
    document.addEventListener("click", (event) => {
        const token = event.target.closest("#live-text .tok.written");
        if (token) choose(Number(token.dataset.step));
    });
    document.addEventListener("focusout", (event) => { if (event.target === text()) hideTip(); });
    document.addEventListener("keydown", (event) => {
        if (!text() || event.target !== text()) return;
        const all = tokens();
        const now = all.findIndex((token) => token.classList.contains("chosen"));
        const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
        const to = move ? now + move : { Home: 0, End: all.length - 1 }[event.key];
        if (event.key === "Escape") hideTip();
        if (to === undefined || !all[to]) return;
        event.preventDefault();
        choose(to + 1);
        showTip(all[to]);
    });

    window.dash_clientside = window.dash_clientside || {};
    window.dash_clientside.layerscope = Object.assign(window.dash_clientside.layerscope || {}, {
        /** The slider moved: mark the token of its step, and tell the pictures. */
        chooseStep(step) {
            if (text() && step) mark(step);
            return step || window.dash_clientside.no_update;
        },
    });
})();
