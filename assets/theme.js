/* Light and dark: the store "theme" tells the figures, the attribute data-bs-theme tells the styles. */
window.dash_clientside = window.dash_clientside || {};
window.dash_clientside.layerscope = Object.assign(window.dash_clientside.layerscope || {}, {
    switchTheme(clicks) {
        const root = document.documentElement;
        if (clicks) {
            root.setAttribute("data-bs-theme", root.getAttribute("data-bs-theme") === "dark" ? "light" : "dark");
            document.cookie = `layerscope-theme=${root.getAttribute("data-bs-theme")}; path=/; max-age=31536000; samesite=strict`;
            try { window.localStorage.setItem("layerscope-theme", root.getAttribute("data-bs-theme")); } catch (closed) { return root.getAttribute("data-bs-theme"); }
        }
        return root.getAttribute("data-bs-theme");
    },
});
