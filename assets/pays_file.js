// A file of prompts, read in the browser into the text box beside it. Nothing is uploaded.
// In: props.most, the bytes that are read at most.
const input = element.querySelector("input"), said = element.querySelector(".sd-pays-said");
const say = (text) => { said.textContent = text; };

async function read(file) {
  if (file.size > props.most) return say("The file has " + file.size.toLocaleString("en-US") + " bytes; at most " + props.most.toLocaleString("en-US") + " are read.");
  let text;
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
  } catch (error) {
    return say("The file is not UTF-8 text.");
  }
  const area = document.querySelector("#sd-pays-prompts textarea");
  area.value = text;
  area.dispatchEvent(new Event("input", { bubbles: true }));
  const lines = text.split("\n").filter((line) => line.trim()).length;
  say(lines.toLocaleString("en-US") + (lines === 1 ? " line" : " lines") + " read from " + file.name + ".");
}

input.addEventListener("change", () => {
  const file = input.files[0];
  if (file) read(file);
  input.value = "";
});
