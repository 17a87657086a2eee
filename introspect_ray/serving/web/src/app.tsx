import { render } from "preact";
import { tokenWanted, waiting } from "./api";
import { Bar } from "./bar";
import { Explanation } from "./explanation";
import { Grid } from "./grid";
import { HeatCard } from "./heat";
import { HistoryCard } from "./history-card";
import { Sentence } from "./sentence";
import { missing, models, start } from "./state";
import { TokenForm } from "./token-form";
import { State } from "./widgets";
import { WhatIfCard } from "./what-if";

function App() {
  return (
    <>
      <Bar />
      {tokenWanted.value !== null && <TokenForm reason={tokenWanted.value} />}
      <p class="waiting" role="status">{waiting.value || missing.value}</p>
      {models.value === null ? <main class="start"><State of={models} what="models" /></main> : (
        <main>
          <div class="wide"><Sentence /><Grid /><WhatIfCard /></div>
          <div class="side"><Explanation /><HeatCard /><HistoryCard /></div>
        </main>
      )}
      <footer><a href="openapi.json">API</a></footer>
    </>
  );
}

render(<App />, document.getElementById("app")!);
start();
