/* Writes the state of a page's controls into the query of the address, without a new page (see components/url_state.py). */
window.layerscope = window.layerscope || {};

/** fields: [[query key, field of the property's object or null], ...]; values: the properties, in the same order. */
window.layerscope.keepUrl = function (fields, values) {
    const url = new URL(window.location.href);
    fields.forEach(([key, field], i) => {
        let value = values[i];
        if (field !== null && value !== null && value !== undefined) value = value[field];
        if (Array.isArray(value)) value = value.join(",");
        if (value === null || value === undefined || value === "") url.searchParams.delete(key);
        else url.searchParams.set(key, String(value));
    });
    if (url.href !== window.location.href) window.history.replaceState(window.history.state, "", url);
    return window.dash_clientside.no_update;
};
