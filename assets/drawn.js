/* Draws the elements that components/drawn.py sends: [tag, attributes, children] and texts. Only tags and attributes that show something. */
(function () {
    const TAGS = new Set(["div", "span", "b", "i", "p", "h3", "ul", "li", "table", "thead", "tbody", "tr", "th", "td", "button", "details", "summary", "dl", "dt", "dd"]);
    const allowed = (name) => /^(class|title|role|tabindex|colspan|style|data-[\w-]+|aria-[\w-]+)$/.test(name);
    const camel = (name) => name.replace(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`);

    function make(item) {
        if (typeof item === "string") return document.createTextNode(item);
        const [tag, attributes, children] = item;
        if (!TAGS.has(tag)) throw new Error(`<${tag}> is not drawn`);
        const element = document.createElement(tag);
        for (const [name, value] of Object.entries(attributes)) {
            if (!allowed(name)) throw new Error(`attribute ${name} is not drawn`);
            if (name === "style") for (const [key, entry] of Object.entries(value)) element.style.setProperty(key.startsWith("--") ? key : camel(key), String(entry));
            else element.setAttribute(name, String(value));
        }
        for (const child of children) element.append(make(child));
        return element;
    }

    /** What stands in data-still: drawn when the element comes, again when React gives the element to something else. */
    const drawn = new WeakMap();
    function fill(host) {
        for (const node of drawn.get(host) || []) node.remove();
        const nodes = host.dataset.still === undefined ? [] : JSON.parse(host.dataset.still).map(make);
        host.append(...nodes);
        drawn.set(host, nodes);
    }
    new MutationObserver((changes) => {
        const hosts = new Set();
        for (const change of changes) {
            if (change.type === "attributes") hosts.add(change.target);
            for (const node of change.addedNodes) {
                if (node.nodeType !== Node.ELEMENT_NODE) continue;
                if (node.dataset?.still !== undefined) hosts.add(node);
                if (node.firstElementChild) for (const inside of node.querySelectorAll("[data-still]")) hosts.add(inside);
            }
        }
        for (const host of hosts) fill(host);
    }).observe(document.documentElement, { childList: true, subtree: true, attributeFilter: ["data-still"] });

    /** Where the keyboard is inside the frame: the tag and data attributes that the element was drawn with; "" for an element that has none. */
    function addressed(host) {
        const focused = document.activeElement;
        if (focused === host || !host.contains(focused)) return "";
        const data = [...focused.attributes].filter(({ name }) => name.startsWith("data-"));
        return data.length ? focused.tagName.toLowerCase() + data.map(({ name, value }) => `[${name}="${CSS.escape(value)}"]`).join("") : "";
    }

    const latest = new Map();

    /** Draws into the frame; when the page is still being put together the frame may come later, or be made once more and empty. */
    function place(id, items, tries, again = false) {
        if (again && latest.get(id) !== items) return;
        latest.set(id, items);
        const host = document.getElementById(id);
        if (host && (!again || !host.hasChildNodes())) {
            const focused = addressed(host);
            host.replaceChildren(...items.map(make));
            if (focused) host.querySelector(focused)?.focus({ preventScroll: true });  // a table that comes again leaves the keyboard where it was
            host.dispatchEvent(new CustomEvent("drawn", { bubbles: true }));
            if (host.matches(".strip-tokens")) {  // once its font is there: before, its lines break elsewhere
                document.fonts.ready.then(() => requestAnimationFrame(() => host.querySelector(".chosen")?.scrollIntoView({ block: "nearest" })));
            }
        }
        if (items.length && tries > 0 && (tries > 90 || !host)) setTimeout(() => place(id, items, tries - 1, true), 50);
    }

    window.dash_clientside = window.dash_clientside || {};
    window.dash_clientside.layerscope = Object.assign(window.dash_clientside.layerscope || {}, {
        draw(items, store) {
            if (items) place(store.replace(/-drawing$/, ""), items, 100);
            return window.dash_clientside.no_update;
        },
    });
})();
