// The demo's script: the browser's own WebSocket, EventSource and fetch, and nothing else.
// What comes from the server or a sender is shown by textContent, never as HTML.
"use strict";

const ENTRIES = 100; // shown of one user; the oldest go
const STAY_AWAY = new Set([4003, 4009]); // close codes after which only a person connects again
const NEW_TOKEN = new Set([4001, 4010]);
const SSE_EVENTS = ["connected", "notification", "subscribed", "unsubscribed", "caught_up", "gap", "shutdown"];

const $ = (selector, root = document) => root.querySelector(selector);
const path = (name) => new URL(name, document.baseURI);

let apiKey = null;
let tenantId = "default";

async function fetchSession() {
  const response = await fetch(path("demo/session"));
  const body = await response.json();
  if (!response.ok) throw new Error(errorText(body));
  return body;
}

function errorText(body) {
  const error = body.error ?? {};
  return [error.message ?? "The server gave no reason.", error.hint].filter(Boolean).join(" — ");
}

function jsonText(value) {
  const line = JSON.stringify(value);
  return line.length > 60 ? JSON.stringify(value, null, 2) : line;
}

function timeText(date) {
  return date.toLocaleTimeString([], { hourCycle: "h23" });
}

function showProblem(text) {
  const problem = $("#problem");
  problem.textContent = text;
  problem.hidden = !text;
}

class User {
  constructor({ user_id, token }, transport) {
    this.id = user_id;
    this.token = token;
    this.link = null; // the WebSocket or EventSource
    this.wanted = false;
    this.attempts = 0;
    this.timer = null;
    this.reconnectAfter = null; // seconds, as a `shutdown` message told
    this.following = new Set();
    this.entries = new Map(); // notification id -> its element
    this.build(transport);
  }

  // --- the card ---

  build(transport) {
    const card = $("#user").content.cloneNode(true).firstElementChild;
    card.id = `user-${this.id}`;
    $("h2", card).textContent = this.id;
    $(".avatar", card).textContent = this.id[0];
    $(".transport", card).value = transport;
    $(".transport", card).addEventListener("change", () => this.reconnect());
    $(".toggle", card).addEventListener("click", () => (this.wanted ? this.disconnect() : this.connect()));
    $(".follow", card).addEventListener("click", () => this.toggleChannel());
    this.card = card;
    $("#users").append(card);
    this.show("closed", "not connected");
    this.showChannel();
  }

  show(state, text, note = "", bad = false) {
    const label = $(".state", this.card);
    label.dataset.state = state;
    label.textContent = text;
    $(".toggle", this.card).textContent = this.wanted ? "Disconnect" : "Connect";
    if (note || state !== "waiting") this.note(note, bad);
  }

  note(text, bad = false) {
    const note = $(".note", this.card);
    note.textContent = text;
    note.classList.toggle("bad", bad);
  }

  showChannel() {
    const channel = $("#channel").value.trim();
    const button = $(".follow", this.card);
    button.textContent = `${this.following.has(channel) ? "Leave" : "Follow"} ${channel || "…"}`;
    button.disabled = !channel;
  }

  // --- its connection ---

  get overWebSocket() {
    return $(".transport", this.card).value === "websocket";
  }

  connect() {
    this.drop();
    this.wanted = true;
    this.show("connecting", "connecting");
    if (this.overWebSocket) this.openWebSocket();
    else this.openEventSource();
  }

  reconnect() {
    if (this.wanted) this.connect();
  }

  disconnect() {
    this.wanted = false;
    this.drop();
    this.show("closed", "not connected", "What is published to this user meanwhile waits in the queue.");
  }

  drop() {
    clearTimeout(this.timer);
    const link = this.link;
    this.link = null; // what the old one still says is passed over
    if (link) link.close();
  }

  openWebSocket() {
    const url = path("ws?acks=1");
    url.protocol = url.protocol.replace("http", "ws");
    // As a subprotocol the token stands in no URL, and so in no log of a proxy.
    const socket = new WebSocket(url, ["notifyd.v1", `bearer.${this.token}`]);
    this.link = socket;
    socket.addEventListener("message", ({ data }) => {
      if (this.link !== socket) return;
      const { type, ...message } = JSON.parse(data);
      this.receive(type, message);
    });
    socket.addEventListener("close", ({ code, reason }) => {
      if (this.link === socket) this.closed(code, reason);
    });
  }

  openEventSource() {
    const url = path("sse?acks=1");
    url.searchParams.set("token", this.token); // an EventSource sends no headers
    if (this.following.size) url.searchParams.set("channels", [...this.following].join(","));
    const source = new EventSource(url);
    this.link = source;
    for (const type of SSE_EVENTS) {
      source.addEventListener(type, ({ data }) => {
        if (this.link === source) this.receive(type, JSON.parse(data));
      });
    }
    source.addEventListener("error", ({ data }) => {
      if (this.link !== source) return;
      if (data !== undefined) {
        this.receive("error", JSON.parse(data)); // the server's, not the connection's
      } else if (source.readyState === EventSource.CLOSED) {
        this.closed(4001, "refused"); // by an HTTP status, which a page cannot read
      } else {
        this.show("waiting", "reconnecting");
      }
    });
  }

  closed(code, reason) {
    this.link = null;
    const why = `Closed with ${code}${reason ? `: ${reason}` : ""}.`;
    if (STAY_AWAY.has(code)) {
      this.wanted = false;
      this.show("refused", "closed", why, true);
      return;
    }
    const limit = Math.min(15, 0.5 * 2 ** this.attempts++);
    const seconds = this.reconnectAfter ?? limit * (0.5 + Math.random() / 2);
    this.reconnectAfter = null;
    this.show("waiting", "reconnecting", `${why} Again in ${seconds.toFixed(1)} s.`);
    this.timer = setTimeout(async () => {
      if (NEW_TOKEN.has(code)) await this.renewToken();
      this.reconnect();
    }, seconds * 1000);
  }

  async renewToken() {
    try {
      const session = await fetchSession();
      apiKey = session.api_key;
      this.token = session.users.find((user) => user.user_id === this.id).token;
    } catch (error) {
      this.note(`No new token: ${error.message}`, true); // the next attempt asks again
    }
  }

  send(type, payload) {
    this.link.send(JSON.stringify({ type, payload }));
  }

  // --- what arrives ---

  receive(type, message) {
    switch (type) {
      case "connected":
        this.attempts = 0;
        this.show("connected", "connected", `Connection ${message.connection_id}`);
        if (this.overWebSocket && this.following.size) {
          this.send("Subscribe", { channels: [...this.following] });
        }
        break;
      case "notification":
        this.notification(message);
        break;
      case "acked":
        for (const id of message.notification_ids ?? [message.notification_id]) this.acknowledged(id);
        break;
      case "subscribed":
        for (const channel of message.payload) this.following.add(channel);
        this.tell(`Follows ${message.payload.join(", ")}`);
        break;
      case "unsubscribed":
        for (const channel of message.payload) this.following.delete(channel);
        this.tell(`Left ${message.payload.join(", ")}`);
        break;
      case "caught_up":
        this.tell(`Caught up: ${message.replayed} replayed`);
        break;
      case "gap":
        this.tell(`A gap in ${message.stream}: ${message.reason}`);
        break;
      case "shutdown":
        this.reconnectAfter = message.reconnect_after_seconds;
        this.tell(`The server stops: ${message.reason}`);
        break;
      case "error":
        this.note(`${message.code}: ${message.message}`, true);
        break;
    }
  }

  notification({ id, occurred_at, event_type, payload, metadata }) {
    const known = this.entries.get(id);
    if (known) {
      // At least once: the same id may come again on another connection.
      this.mark(known, "came again");
      if ($(".auto", this.card).checked) this.acknowledge(id);
      return;
    }
    const entry = $("#entry").content.cloneNode(true).firstElementChild;
    entry.dataset.id = id;
    $(".type", entry).textContent = event_type;
    $(".payload", entry).textContent = jsonText(payload);
    $(".id", entry).textContent = id.slice(0, 8);
    $(".id", entry).title = id;
    $("time", entry).textContent = timeText(new Date(occurred_at));
    if (metadata.replayed) this.mark(entry, "replayed");
    if (metadata.priority !== "Normal") this.mark(entry, metadata.priority);
    if (metadata.audience.type !== "All") this.mark(entry, `for ${metadata.audience.type}`);
    $(".confirm", entry).addEventListener("click", () => this.acknowledge(id));
    this.add(entry);
    this.entries.set(id, entry);
    if ($(".auto", this.card).checked) this.acknowledge(id);
  }

  mark(entry, text) {
    const marks = $(".marks", entry);
    if ([...marks.children].some((mark) => mark.textContent === text)) return;
    const mark = document.createElement("span");
    mark.className = text === "replayed" || text === "came again" ? "mark replayed" : "mark";
    mark.textContent = text;
    marks.append(mark);
  }

  tell(text) {
    const entry = $("#entry").content.cloneNode(true).firstElementChild;
    entry.classList.add("told");
    $(".type", entry).textContent = text;
    $("time", entry).textContent = timeText(new Date());
    this.add(entry);
    this.showChannel();
  }

  add(entry) {
    const log = $(".log", this.card);
    log.prepend(entry);
    while (log.children.length > ENTRIES) {
      this.entries.delete(log.lastElementChild.dataset.id);
      log.lastElementChild.remove();
    }
  }

  // --- what the user does ---

  async acknowledge(id) {
    const entry = this.entries.get(id);
    if (this.overWebSocket) {
      if (this.link?.readyState === WebSocket.OPEN) this.send("Ack", { notification_id: id });
      return;
    }
    try {
      const response = await fetch(path("api/v1/acks"), {
        method: "POST",
        headers: { "Content-Type": "application/json", Authorization: `Bearer ${this.token}` },
        body: JSON.stringify({ notification_id: id }),
      });
      const body = await response.json();
      if (!response.ok) throw new Error(errorText(body));
      for (const acked of body.acked) this.acknowledged(acked);
      if (body.refused.length) $(".ack", entry).textContent = "unknown to the server";
    } catch (error) {
      this.note(`Not acknowledged: ${error.message}`, true);
    }
  }

  acknowledged(id) {
    const entry = this.entries.get(id);
    if (!entry) return;
    $(".ack", entry).textContent = "acknowledged";
    $(".ack", entry).classList.add("done");
    $(".confirm", entry).hidden = true;
  }

  toggleChannel() {
    const channel = $("#channel").value.trim();
    const follows = this.following.has(channel);
    if (this.overWebSocket && this.link?.readyState === WebSocket.OPEN) {
      this.send(follows ? "Unsubscribe" : "Subscribe", { channels: [channel] });
      return;
    }
    // An EventSource is one-way: its channels stand in its URL.
    if (follows) this.following.delete(channel);
    else this.following.add(channel);
    this.showChannel();
    this.reconnect();
  }
}

// --- the form ---

function notification() {
  const [type, user] = $("input[name=target]:checked").value.split(":");
  const target = { type };
  if (type === "user") target.value = user;
  if (type === "channel") target.value = $("#channel").value.trim();
  const content = { event_type: $("#event-type").value, payload: JSON.parse($("#payload").value) };
  const priority = $("#priority").value;
  return priority === "Normal" ? { target, ...content } : { target, ...content, priority };
}

function showResult(text, bad = false) {
  const result = $("#result");
  result.textContent = text;
  result.classList.toggle("bad", bad);
}

async function publish(event) {
  event.preventDefault();
  let body;
  try {
    body = JSON.stringify(notification());
  } catch (error) {
    showResult(`The payload is not JSON: ${error.message}`, true);
    return;
  }
  try {
    const response = await fetch(path("api/v1/notifications"), {
      method: "POST",
      headers: {
        "Content-Type": "application/json",
        "X-API-Key": apiKey,
        "X-Tenant-ID": tenantId, // without tenants there is this one all the same
      },
      body,
    });
    const answer = await response.json();
    if (response.ok) showResult(receiptText(answer));
    else showResult(`${response.status}: ${errorText(answer)}`, true);
  } catch (error) {
    showResult(`The server cannot be reached: ${error.message}`, true);
  }
}

function receiptText({ outcome, delivered_to, queued, hint }) {
  const parts = [outcome];
  if (delivered_to) parts.push(`to ${delivered_to} connection${delivered_to === 1 ? "" : "s"}`);
  if (queued) parts.push(`waits for ${queued} user${queued === 1 ? "" : "s"}`);
  if (hint) parts.push(hint);
  return parts.join(" · ");
}

function showCommand() {
  let body;
  try {
    body = JSON.stringify(notification());
  } catch {
    body = "{…}"; // while the payload is being typed
  }
  // Between single quotes a shell reads everything as it stands, but for the quote itself.
  const quoted = body.replaceAll("'", `'\\''`);
  $("#command").textContent =
    `curl ${path("api/v1/notifications")} \\\n  -H 'X-API-Key: ${apiKey ?? "…"}' \\\n` +
    (tenantId === "default" ? "" : `  -H 'X-Tenant-ID: ${tenantId}' \\\n`) +
    `  -H 'Content-Type: application/json' \\\n  -d '${quoted}'`;
}

async function copyCommand() {
  const button = $("#copy");
  try {
    await navigator.clipboard.writeText($("#command").textContent);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed";
  }
  setTimeout(() => (button.textContent = "Copy"), 1500);
}

async function start() {
  let session;
  try {
    session = await fetchSession();
  } catch (error) {
    showProblem(`The demo cannot start: ${error.message}`);
    return;
  }
  apiKey = session.api_key;
  tenantId = session.tenant_id;
  if (!apiKey) showProblem("The settings hold only the digest of the API key: publish from a terminal.");
  const users = session.users.map((user, index) => new User(user, index ? "sse" : "websocket"));
  for (const user of users) {
    user.following.add($("#channel").value);
    user.connect();
    user.showChannel();
  }
  $("#publish").addEventListener("submit", publish);
  $("#publish").addEventListener("input", showCommand);
  $("#channel").addEventListener("input", () => users.forEach((user) => user.showChannel()));
  $("#copy").addEventListener("click", copyCommand);
  showCommand();
}

start();
