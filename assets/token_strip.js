/* The token strip: one listener for clicks, arrow keys and hover; the chosen position lies in the store "position". */
(function () {
    const strip = () => document.getElementById("token-strip");
    const choose = (position) => window.dash_clientside.set_props("position", { data: position });

    function frame(position) {
        const tokens = strip();
        if (!tokens) return;
        for (const old of tokens.querySelectorAll(".tok.chosen")) { old.classList.remove("chosen"); old.setAttribute("aria-selected", "false"); }
        const token = tokens.children[position];
        if (token) { token.classList.add("chosen"); token.setAttribute("aria-selected", "true"); token.scrollIntoView({ block: "nearest" }); }
        for (const row of document.querySelectorAll("tr[data-pos]")) row.classList.toggle("chosen", Number(row.dataset.pos) === position);
    }

    const number = (value) => (value === null ? "" : Number(value).toFixed(3));
    const level = (value, full) => `${value === null ? 0 : Math.round(100 * Math.min(Math.max(Number(value) / full, 0), 1))}%`;

    /** The elements of one token, as assets/drawn.js makes them. */
    function token({ labels, ids, surprise, entropy, generated, chosen, full }, at) {
        const classes = ["tok", at === chosen ? "chosen" : "", at >= generated ? "generated" : "", at === generated ? "first-generated" : ""];
        return ["span", {
            role: "option", class: classes.filter(Boolean).join(" "), "aria-selected": String(at === chosen), "data-pos": at, "data-id": ids[at],
            style: { "--surprise": level(surprise[at], full.surprise), "--entropy": level(entropy[at], full.entropy) },
            "data-surprise": number(surprise[at]), "data-entropy": number(entropy[at]),
        }, [labels[at]]];
    }

    let tip = null;
    function hideTip() { if (tip) { tip.remove(); tip = null; } }
    function showTip(token) {
        hideTip();
        const data = token.dataset;
        const nats = (text) => (text === "" ? "none" : `${Number(text).toFixed(2)} nats`);
        tip = document.createElement("div");
        tip.className = "tip";
        tip.setAttribute("role", "tooltip");
        const name = document.createElement("b");
        name.textContent = token.textContent;
        const lines = [`position ${data.pos}, id ${data.id}${token.classList.contains("generated") ? ", generated" : ""}`];
        lines.push(data.surprise === "" ? "nothing predicts this token" : `log-prob ${(-Number(data.surprise)).toFixed(3)} nats, p ${Math.exp(-Number(data.surprise)).toPrecision(3)}`);
        lines.push(`entropy of the next token ${nats(data.entropy)}`);
        tip.append(name);
        for (const line of lines) { const row = document.createElement("div"); row.textContent = line; tip.append(row); }
        document.body.append(tip);
        const box = token.getBoundingClientRect();
        tip.style.left = `${Math.max(8, Math.min(box.left, window.innerWidth - tip.offsetWidth - 8))}px`;
        tip.style.top = `${box.bottom + 8}px`;
    }

    document.addEventListener("click", (event) => {
        const target = event.target.closest("#token-strip .tok, tr[data-pos]");
        if (target) choose(Number(target.dataset.pos));
    });
    document.addEventListener("mouseover", (event) => {
        const token = event.target.closest("#token-strip .tok");
        if (token) showTip(token); else hideTip();
    });
    document.addEventListener("change", (event) => {
        if (event.target.id === "strip-metric" && strip()) strip().dataset.metric = event.target.value;
    });
    document.addEventListener("keydown", (event) => {
        if (event.target !== strip()) return;
        const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
        const now = [...strip().children].findIndex((token) => token.classList.contains("chosen"));
        const last = strip().children.length - 1;
        const to = step ? now + step : { Home: 0, End: last }[event.key];
        if (to === undefined || to < 0 || to > last) return;
        event.preventDefault();
        choose(to);
    });

    window.dash_clientside = window.dash_clientside || {};
    window.dash_clientside.layerscope = Object.assign(window.dash_clientside.layerscope || {}, {
        drawStrip(tokens) {
            const { layerscope, no_update } = window.dash_clientside;
            if (tokens) layerscope.draw(tokens.labels.map((_, at) => token(tokens, at)), "token-strip-drawing");
            return no_update;
        },
        /** A page of a trace was opened: its trace and position become the app's. */
        openTrace(page) { return page ? [page.trace, page.position] : [window.dash_clientside.no_update, window.dash_clientside.no_update]; },
        /** The chosen position changed: frame it, and keep it in the address. */
        framePosition(position) {
            if (!strip() || position === null || position === undefined) return;
            frame(position);
            window.layerscope.keepUrl([["pos", null]], [position]);
        },
    });
})();
