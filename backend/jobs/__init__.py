"""Jobs: their records, the queue, and the processes that run them.

    records         what a job is and how it stands; what pages ask
    task_queue      Huey, in SQLite or Redis
    worker_process  starts the supervisor and keeps it running; supervisor  says how a worker ended; processes  signals, limits, parent death
    warm_engine     the model a worker keeps between jobs
"""
