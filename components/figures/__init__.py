"""How the numbers look: pure functions from arrays to Plotly figures, one module a family of views.

theme        the two templates, the colour scales, and the shared ways to label tokens and write hovers
attention    one head's pattern; a metric over layers x heads
activations  norms over layers x tokens; one layer's tokens x dimensions; statistics through depth
lens         layers x positions with the top tokens written in; curves through depth

Every function takes `theme` ("light" or "dark") and touches neither traces nor the app. Token text is hostile: it goes through
`theme.escape` before Plotly, which reads tick labels and hovers as markup, sees it.
"""
