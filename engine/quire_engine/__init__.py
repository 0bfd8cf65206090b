"""The engine: KV of document chunks, made once, stored small, stitched into any prompt. No screen, no documents."""
