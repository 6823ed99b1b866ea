"""Certificates for models that write: their answers, who reads them, and how often the reader errs.

f(x) = oracle(model(x, prompt)) is an ordinary base classifier, so its smoothed label is constant in an L2 ball. Where
answers are free text, clusters of equal meaning are built on selection draws and frozen: "equivalent to the largest
cluster's representative" is then a fixed question, which fresh draws answer. Clustering and certifying on the same
draws would prove nothing: the question would depend on its own answers.

Start in `certify`. `answers` draws and keeps what a model says; `oracles` and `judges` read it; `errors` says what
their errors do to a certificate. The models themselves are in `medrobust_lib.models`, noise and bounds in
`medrobust_lib.smoothing`.
"""
