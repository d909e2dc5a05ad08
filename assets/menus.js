/* Popups (details.popup), full screen, copy link, and buttons that put a value into a store: one listener for the page. */
(function () {
    const closePopups = (except) => document.querySelectorAll("details.popup[open]").forEach((popup) => { if (popup !== except) popup.open = false; });

    async function copyLink(button) {
        const words = button.querySelector("span:last-child");
        let said = "Copied";
        try {
            await navigator.clipboard.writeText(window.location.href);
        } catch (refused) {
            said = "Copy from the address bar";  // the clipboard is closed to pages that are not on a secure address
        }
        words.textContent = said;
        setTimeout(() => { words.textContent = "Copy link"; }, 1600);
    }

    /** data-set="store" data-value="text": puts {value, at} into the store, or the bare value into data-property. */
    function setValue(element) {
        if (element.dataset.confirm && !window.confirm(element.dataset.confirm)) return;
        const value = element.dataset.value;
        const property = element.dataset.property || "data";
        window.dash_clientside.set_props(element.dataset.set, { [property]: property === "data" ? { value, at: Date.now() } : value });
    }

    document.addEventListener("click", (event) => {
        closePopups(event.target.closest("details.popup"));
        const tool = event.target.closest("[data-tool]");
        if (tool && tool.dataset.tool === "copy-link") copyLink(tool);
        if (tool && tool.dataset.tool === "full-screen") {
            if (document.fullscreenElement) document.exitFullscreen();
            else tool.closest(".ls-card").requestFullscreen();
        }
        const setter = event.target.closest("[data-set]");
        if (setter && !event.target.closest("a")) setValue(setter);
    });
    document.addEventListener("keydown", (event) => {
        if (event.key === "Escape") {
            const around = event.target.closest("details.popup[open]");
            closePopups(null);
            if (around) around.querySelector("summary").focus();  // what had the focus is hidden now
        }
        if ((event.key === "Enter" || event.key === " ") && event.target.matches("tr[data-set], tr[data-pos], tr[data-layer]")) {
            event.preventDefault();
            event.target.click();
        }
    });
})();
