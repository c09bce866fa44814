// Requests to the server that served this page; the token in the address goes with each.

const token = location.pathname.split("/")[1];

async function send(path, options) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: { "x-review-token": token, ...options.headers } });
  } catch {
    throw new Error("The server does not answer: was it stopped? Nothing is lost; start review again.");
  }
  const body = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(body.error ?? `The server refused this (${response.status}).`);
  return body;
}

/** Returns the answer to a question. */
export function ask(path, query = {}) {
  const words = new URLSearchParams(query).toString();
  return send(`api/${path}${words ? `?${words}` : ""}`, { method: "GET" });
}

/** Sends a command and returns its answer; a label is on the disk by then. */
export function command(path, body = {}) {
  return send(`api/${path}`, {
    method: "POST",
    body: JSON.stringify(body),
    headers: { "content-type": "application/json" },
  });
}
