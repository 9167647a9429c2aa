"""`flux-quant report`: results of `flux-quant bench` as one HTML page, or as Markdown with plots beside it."""
