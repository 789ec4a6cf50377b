"""Serves one engine to the parent process: requests and answers are JSON, one a line.

In: {"engine", "job"} and then requests on standard input. Out: an answer for each on standard output, {"error"} if it
failed.
"""

from .service import serve

if __name__ == "__main__":
    serve()
