"""What of a race leaves this machine: links, files that show it, pictures, and the comparison with another run.

In: a `Request` or a `Trace`. Out: text. Nothing is kept on a server. The page does the same in the browser
(assets/link.js, reading.js, image.js, compare.js). Imports neither gradio nor torch.
"""
