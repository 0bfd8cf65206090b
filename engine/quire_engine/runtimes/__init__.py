"""The ways a plan is executed: llama.cpp now, torch later."""
