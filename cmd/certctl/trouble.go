package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
)

func (c *cli) explainAgent(ctx context.Context, cmd *cobra.Command, args []string) error {
	if c.socketSet || len(args) > 1 || len(args) == 1 && !strings.HasPrefix(args[0], "spiffe://") {
		return &failure{code: exitUsage, what: "with --agent, explain takes a SPIFFE ID or nothing", next: joined(cmd, args) + "See `certctl --help`"}
	}
	s, err := c.agentStatus(ctx)
	if err != nil {
		return err
	}
	workloads := s.GetWorkloads()
	if len(args) == 1 {
		workloads = slices.DeleteFunc(slices.Clone(workloads), func(w *meshcav1.WorkloadStatus) bool { return identity(w) != args[0] })
		if len(workloads) == 0 {
			return no("the agent holds nothing of "+args[0]+", and held nothing of it", nil, "It learns an ID by its first SVID: `certctl explain --agent` shows every workload, those that were never answered too")
		}
	}
	out := struct {
		LastError string    `json:"lastError"`
		Workloads []message `json:"workloads"`
	}{LastError: s.GetLastError(), Workloads: []message{}}
	var troubled []*meshcav1.WorkloadStatus
	for _, w := range workloads {
		if len(args) == 1 || w.GetState() != "fresh" || w.GetLastNack() != "" || w.GetUnknownCount() > 0 || w.GetLastLimit() != "" {
			troubled = append(troubled, w)
			out.Workloads = append(out.Workloads, message{w})
		}
	}
	return c.show(out, func(p *page) {
		if s.GetLastError() != "" && !s.GetConnected() {
			p.line("the agent is not connected to the CA: %s", s.GetLastError())
			p.gap()
		}
		if len(troubled) == 0 {
			p.line("all %d workloads of this agent have a fresh SVID, and their proxies have taken what they asked for", len(workloads))
		}
		for i, w := range troubled {
			if i > 0 {
				p.gap()
			}
			drawTrouble(p, w)
		}
	})
}

func drawTrouble(p *page, w *meshcav1.WorkloadStatus) {
	p.line("%s", place(w))
	id := identity(w)
	var list []pair
	if w.GetPod() != "" {
		list = append(list, pair{"socket", text(w.GetSocket())})
	}
	list = append(list, []pair{{"state", text(w.GetState()).as(stateTone(w.GetState()))}, {"SPIFFE ID", text(id)}, {"token file", text(w.GetTokenFile())}}...)
	if h := w.GetSvid(); h != nil {
		list = append(list, pair{"SVID", p.heldEnds(h)})
	}
	if r := refusalOf(w); r != nil {
		list = append(list, pair{"refused", text(r.GetReason()).as(bad)}, pair{"because", text(r.GetMessage())},
			pair{"at", p.when(w.GetLastRefusalAt())}, pair{"next try", p.when(w.GetNextTry())},
			pair{"what to do", text(advice(refusal.Reason(r.GetReason()), id))})
	}
	if w.GetNacks() > 0 {
		nacks := textf("%d since the agent's start; what proxies were served after was taken", w.GetNacks())
		if w.GetLastNack() != "" {
			nacks = textf("%d, the last: %s", w.GetNacks(), w.GetLastNack()).as(bad)
		}
		list = append(list, pair{"NACKs", nacks})
	}
	if w.GetLastLimit() != "" {
		list = append(list, pair{"limited", textf("%d since the agent's start, the last %s: %s", w.GetLimited(), p.when(w.GetLastLimitAt()).text, w.GetLastLimit()).as(bad)},
			pair{"what to do", text(refusal.PeerLimit.Do())})
	}
	if w.GetUnknownCount() > 0 {
		list = append(list, pair{"not served", text(unknownNames(w)).as(doubtful)}, pair{"what to do", text(refusal.SecretUnknown.Do())})
	}
	p.pairs(list...)
}

// place is where a workload is, as people know it: its pod, or the socket that the agent's configuration names.
func place(w *meshcav1.WorkloadStatus) string {
	if w.GetPod() == "" {
		return w.GetSocket()
	}
	return w.GetNamespace() + "/" + w.GetPod()
}

// placeTitle is the heading of a column of places.
func placeTitle(all []*meshcav1.WorkloadStatus) string {
	if slices.ContainsFunc(all, func(w *meshcav1.WorkloadStatus) bool { return w.GetPod() != "" }) {
		return "POD OR SOCKET"
	}
	return "SOCKET"
}

// identity is whose workload it is, as far as its agent knows: who is denied holds nothing, and was somebody.
func identity(w *meshcav1.WorkloadStatus) string {
	return cmp.Or(w.GetSvid().GetSpiffeId(), w.GetLastSpiffeId())
}

// refusalOf is what a workload was last refused for. Where it is denied, that is one whatever was answered last.
func refusalOf(w *meshcav1.WorkloadStatus) *meshcav1.Refusal {
	r := w.GetLastRefusal()
	if w.GetState() != "denied" || r.GetReason() == string(refusal.IdentityDenied) {
		return r
	}
	return &meshcav1.Refusal{Code: uint32(refusal.IdentityDenied.Code()), Reason: string(refusal.IdentityDenied),
		Message: "an operator denied the identity, and the agent dropped what it held"}
}

// advice is what to do about a refusal, with the ID put in where the commands of it name one.
func advice(r refusal.Reason, id string) string {
	if id == "" {
		return r.Do()
	}
	return strings.ReplaceAll(r.Do(), " ID`", " "+id+"`")
}

// unknownNames are the secrets that proxies of a workload ask for in vain.
func unknownNames(w *meshcav1.WorkloadStatus) string {
	names := strings.Join(w.GetUnknownNames(), ", ")
	if more := int(w.GetUnknownCount()) - len(w.GetUnknownNames()); more > 0 {
		names += fmt.Sprintf(" (%d times in all)", w.GetUnknownCount())
	}
	return names
}
