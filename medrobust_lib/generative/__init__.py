"""Certificates for models that write: their answers, who reads them, and how often the reader errs.

Start in `certify`. `answers` draws and keeps what a model says; `oracles`
and `judges` read it; `errors` says what their errors do to a certificate. The models themselves are in
`medrobust_lib.models`, noise and bounds in `medrobust_lib.smoothing`.
"""
