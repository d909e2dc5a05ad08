/* data-copy-from="id": a button that copies the text of that element, and says so. */
document.addEventListener("click", async (event) => {
    const button = event.target.closest("[data-copy-from]");
    const source = button && document.getElementById(button.dataset.copyFrom);
    if (!source) return;
    const words = button.textContent;
    try {
        await navigator.clipboard.writeText(source.textContent);
        button.textContent = "Copied";
    } catch (refused) {
        window.getSelection().selectAllChildren(source);  // the clipboard is closed to pages that are not on a secure address
        button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = words; }, 1600);
});
