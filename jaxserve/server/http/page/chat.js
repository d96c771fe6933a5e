// Chat: sends the conversation and shows the answer as it comes. What a model or a server says
// becomes text of the page, never markup.

import { failure, headers } from "./key.js";

const at = (id) => document.getElementById(id);
const form = at("ask"), prompt = at("prompt"), turns = at("turns");
const send = at("send"), stop = at("stop"), clear = at("clear"), error = at("error");

let messages = [];
let running = null; // The AbortController of the answer that is on its way.

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (running === null) ask(prompt.value);
});
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    form.requestSubmit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
stop.addEventListener("click", () => running?.abort());
clear.addEventListener("click", () => {
  running?.abort();
  messages = [];
  turns.replaceChildren();
  tell("");
  prompt.focus();
});

function tell(text) {
  error.textContent = text;
  error.hidden = text === "";
}

function addTurn(name, text) {
  const turn = document.createElement("div");
  turn.className = "turn";
  const title = document.createElement("h3");
  title.textContent = name;
  const body = document.createElement("p");
  body.textContent = text;
  turn.append(title, body);
  turns.append(turn);
  turns.scrollTop = turns.scrollHeight;
  return turn;
}

function setBusy(controller) {
  running = controller;
  send.disabled = controller !== null;
  stop.disabled = controller === null;
  turns.setAttribute("aria-busy", String(controller !== null));
}

async function ask(text) {
  const conversation = messages; // "New chat" makes another one.
  const question = { role: "user", content: text };
  const controller = new AbortController();
  setBusy(controller);
  tell("");
  const asked = addTurn("You", text);
  const turn = addTurn("Model", "");
  const answer = { turn, text: "", began: performance.now(), first: null, usage: null };
  prompt.value = "";
  try {
    await stream([...conversation, question], answer, controller.signal);
    answer.end = "";
  } catch (problem) {
    answer.end = controller.signal.aborted ? "stopped" : "cut short";
    if (!controller.signal.aborted) tell(problem.message);
  }
  if (answer.first === null && answer.end !== "") {
    // Nothing came: the question goes back to where it can be sent again.
    asked.remove();
    turn.remove();
    if (conversation === messages) prompt.value ||= text;
  } else {
    conversation.push(question, { role: "assistant", content: answer.text });
    showFigures(answer);
  }
  setBusy(null);
}

async function stream(conversation, answer, signal) {
  const response = await fetch("v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json", ...headers() },
    body: JSON.stringify({
      messages: conversation,
      temperature: at("temperature").valueAsNumber,
      max_tokens: at("max-tokens").valueAsNumber,
      stream: true,
      stream_options: { include_usage: true },
    }),
    signal,
  });
  if (!response.ok) throw new Error(await failure(response));
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
    answer.usage = chunk.usage ?? answer.usage;
    add(answer, chunk.choices[0]?.delta.content ?? "");
  }
  throw new Error("the connection ended before the answer did");
}

function add(answer, text) {
  if (text === "") return;
  answer.first ??= performance.now();
  answer.text += text;
  // Whoever has scrolled back to read stays there.
  const follows = turns.scrollHeight - turns.scrollTop - turns.clientHeight < 40;
  answer.turn.querySelector("p").append(document.createTextNode(text));
  if (follows) turns.scrollTop = turns.scrollHeight;
}

// The data of server-sent events, of lines that may be cut anywhere.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  while (true) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data: ")) yield line.slice(6);
  }
}

function showFigures(answer) {
  const figures = document.createElement("p");
  figures.className = "figures";
  const parts = answer.end ? [answer.end] : [];
  if (answer.usage !== null && answer.first !== null) {
    const seconds = (performance.now() - answer.first) / 1000;
    const count = answer.usage.completion_tokens;
    parts.push(`${count} tokens`, `first after ${Math.round(answer.first - answer.began)} ms`);
    if (count > 1) parts.push(`${((count - 1) / seconds).toPrecision(3)} tokens a second`);
  }
  figures.textContent = parts.join(", ");
  answer.turn.append(figures);
}
