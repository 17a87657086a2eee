import { giveToken } from "./api";

/** Asks for the server's bearer token; requests that wait for it then go on. */
export function TokenForm({ reason }: { reason: string }) {
  const give = (event: SubmitEvent & { currentTarget: HTMLFormElement }) => {
    event.preventDefault();
    const given = String(new FormData(event.currentTarget).get("token") ?? "").trim();
    if (given) giveToken(given);
  };
  return (
    <form class="token" onSubmit={give}>
      <label><span role="alert">{reason}</span>
        <input name="token" type="password" autocomplete="off" autofocus required aria-label="Token" />
      </label>
      <button type="submit">Go on</button>
    </form>
  );
}
