"""`vlm serve`: a model behind OpenAI's HTTP interface. Knows HTTP, queues and hostile clients; nothing of how text is decoded.

`requests` is what may be asked, `pictures` and `prompts` make it ready for the engine, `worker` owns the engine, `replies` says
what came of it, `gate` stands before all of them, `app` joins them, `server` runs them.
`replicas` stands where one model would, and passes what is asked on to several processes, each a `replica`.
"""
