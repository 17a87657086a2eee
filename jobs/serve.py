"""Serve targets, explainers and simulators behind one HTTP API and a page, here or on the cluster of RAY_ADDRESS.

Without arguments: the pocket world's models, and the explainers of jobs/quickstart.py where it has run. Prints the URL
when all models answer; Ctrl-C or SIGTERM answers the requests under way, then stops.
"""

from introspect_ray.cli import run_job
from introspect_ray.config import ServeConfig


def main(config: ServeConfig) -> None:
    from introspect_ray.data.cluster import quiet_stderr  # Ray and torch load only after the config is checked
    from introspect_ray.serving.run import serving, watch

    with quiet_stderr(), serving(config) as service:
        names = [one.name for one in (*service.models.targets, *service.models.explainers, *service.models.simulators)]
        print(f"\nserving {', '.join(names)}", flush=True)
        if not service.models.explainers:
            print("no explainer is served: `make demo` trains those of the pocket world; or name yours in --explainers")
        token = "with the bearer token" if service.needs_token else "without a token, because only this machine can ask"
        print(f"ready at {service.url} ({token})", flush=True)
        try:
            watch()
        except KeyboardInterrupt:
            print("stopping: requests under way are answered first", flush=True)


if __name__ == "__main__":
    run_job(ServeConfig, main, __doc__)
