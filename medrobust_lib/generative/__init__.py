"""Certificates for models that write: their answers, who reads them, and how often the reader errs.

Start in `certify`, or in `study` for a whole set of questions. Answers: answers, protocols, clusters, remembered.
Readers: oracle, oracle_phrases, judge, stand_in_judge. Their errors: calibration, oracle_errors. The models themselves
are in `medrobust_lib.models`, noise and bounds in `medrobust_lib.smoothing`.
"""
