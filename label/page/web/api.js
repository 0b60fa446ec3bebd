// Talks to the server. Owns how a refusal becomes an error; knows nothing of what is asked.

export class Refused extends Error {
  // `status` is 0 where the server could not be reached at all.
  constructor(status, sentence) {
    super(sentence);
    this.status = status;
  }
  // Whether the same request may succeed later, so that what was marked must be kept for it.
  get mayPass() {
    return this.status === 0 || this.status >= 500;
  }
}

export async function ask(path, fields) {
  let reply;
  try {
    reply = await fetch(path, fields === undefined ? {} : {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(fields),
    });
  } catch {
    throw new Refused(0, "the server cannot be reached; see that it still runs, then try again");
  }
  const found = await reply.json().catch(() => null);
  if (reply.ok && found !== null) return found;
  throw new Refused(reply.status, found?.error ?? `the server failed (${reply.status}); what it printed tells more`);
}

// The token has done its work with the first request; the address need not show it to whoever looks on.
export function hideToken() {
  const address = new URL(location.href);
  if (!address.searchParams.has("token")) return;
  address.searchParams.delete("token");
  history.replaceState(null, "", address);
}

export const annotatorInAddress = () => (new URL(location.href).searchParams.get("name") ?? "").trim();
