/* Loaded in the head, before the first paint: the theme last chosen, or the one the system asks for. */
(function () {
    let theme = null;
    try { theme = window.localStorage.getItem("layerscope-theme"); } catch (closed) { theme = null; }
    if (theme !== "light" && theme !== "dark") theme = window.matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
    document.documentElement.setAttribute("data-bs-theme", theme);
    document.cookie = `layerscope-theme=${theme}; path=/; max-age=31536000; samesite=strict`;  // for figures that come with their page (components/browser_theme.py)
})();
