"""Imported by the fork server: DeepSpeed and what it imports late, with its deprecation warnings silenced."""

import logging
import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import deepspeed
    import deepspeed.runtime.zero.muon.muon_optimizer

deepspeed.utils.logger.setLevel(logging.WARNING)
