"""Environments that tests start engines in."""

BATCH_INVARIANT = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}
"""The model's own products give a row the same bits in any company. With AMX they do not, under stock vLLM as well: see the
contract in docs/architecture.md. For tests that compare texts of requests that shared their steps with others."""

AS_IT_COMES = {"ONEDNN_MAX_CPU_ISA": "DEFAULT"}
"""For comparisons with stock vLLM, whose attention uses AMX without asking the system for it: without oneDNN, which asks, it
stops at an illegal instruction."""
