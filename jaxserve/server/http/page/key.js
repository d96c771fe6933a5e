// The API key: it lives in its field alone, and is stored nowhere.

const field = document.getElementById("api-key");

export function headers() {
  const key = field.value.trim();
  return key ? { authorization: `Bearer ${key}` } : {};
}

export function onKeyChange(listener) {
  field.addEventListener("change", listener);
}

// What went wrong, in the server's words where it has some.
export async function failure(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}
