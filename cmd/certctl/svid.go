package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/serial"
)

func (c *cli) svidCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "svid", Short: "List, fetch, inspect, deny and renew SVIDs"}
	cmd.RunE = c.group(cmd)
	cmd.AddCommand(c.listCommand(), c.fetchCommand(), c.inspectCommand(), c.denyCommand(), c.allowCommand(), c.renewCommand())
	return cmd
}

func (c *cli) listCommand() *cobra.Command {
	r := &meshcav1.ListSVIDsRequest{}
	cmd := &cobra.Command{
		Use: "list", Short: "What the CA issued, or with --agent what that agent holds", Args: args(0, 0, "no arguments"),
		Long: `Lists the CA's ledger, newest first: what was issued to whom, on what evidence, and until when it lasts.
Filters narrow it down and must all fit. With --agent: what the agent of this node holds for its workloads.`,
		Example: `  certctl svid list -n payments
  certctl svid list --serial 3F:A0:...  --all
  certctl svid list --agent`,
	}
	f := cmd.Flags()
	f.StringVar(&r.SpiffeId, "id", "", "only this SPIFFE `ID`")
	f.StringVarP(&r.Namespace, "namespace", "n", "", "only this `namespace`")
	f.StringVar(&r.ServiceAccount, "service-account", "", "only this service `account`")
	f.StringVar(&r.Pod, "pod", "", "only what this `pod`'s token proved")
	f.StringVar(&r.Node, "node", "", "only what was issued on this `node`")
	f.StringVar(&r.Serial, "serial", "", "only this `serial` number, hexadecimal")
	f.BoolVar(&r.IncludeExpired, "all", false, "also what has ended")
	f.Uint32Var(&r.Limit, "limit", 1000, "at most this many")
	_ = cmd.RegisterFlagCompletionFunc("id", c.completeIDs)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		ctx, cancel := c.within(cmd)
		defer cancel()
		agent, err := c.one()
		if err != nil {
			return err
		}
		if r.GetLimit() == 0 {
			return usage("--limit 0 shows nothing")
		}
		if agent {
			return c.listHeld(ctx, r)
		}
		return c.listLedger(ctx, r)
	}
	return cmd
}

func (c *cli) listLedger(ctx context.Context, r *meshcav1.ListSVIDsRequest) error {
	entries, err := c.ledger(ctx, r)
	if err != nil {
		return err
	}
	err = c.show(&meshcav1.ListSVIDsResponse{Entries: entries}, func(p *page) {
		if len(entries) == 0 {
			p.line("nothing that fits is in the ledger%s", orLive(r))
			return
		}
		var rows [][]cell
		for _, e := range entries {
			rows = append(rows, []cell{
				text(e.GetSpiffeId()), text(e.GetSerial()), text(p.relative(e.GetIssuedAt().AsTime())), p.ends(e.GetIssuedAt(), e.GetNotAfter()),
				text(e.GetEvidence().GetPod()), text(e.GetEvidence().GetNode()), text(e.GetEvidence().GetCluster()), text(e.GetEvidence().GetRule()),
			})
		}
		p.table([]string{"SPIFFE ID", "SERIAL", "ISSUED", "ENDS", "POD", "NODE", "CLUSTER", "RULE"}, rows)
	})
	if err == nil && uint64(len(entries)) == uint64(r.GetLimit()) {
		fmt.Fprintf(c.err, "certctl: these are the newest %d; --limit shows more, filters narrow it down\n", len(entries))
	}
	return err
}

func orLive(r *meshcav1.ListSVIDsRequest) string {
	if r.GetIncludeExpired() {
		return ""
	}
	return " and still lives; --all shows what has ended too"
}

func (c *cli) ledger(ctx context.Context, r *meshcav1.ListSVIDsRequest) ([]*meshcav1.LedgerEntry, error) {
	conn, err := c.openCA(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	stream, err := conn.CA.ListSVIDs(ctx, r)
	if err != nil {
		return nil, theCA.failed(err)
	}
	var entries []*meshcav1.LedgerEntry
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return entries, nil
		}
		if err != nil {
			return nil, theCA.failed(err)
		}
		entries = append(entries, m.GetEntries()...)
	}
}

// held is the output of `svid list --agent`.
type held struct {
	Self      *message  `json:"self"`
	Workloads []message `json:"workloads"`
}

func (c *cli) listHeld(ctx context.Context, r *meshcav1.ListSVIDsRequest) error {
	if r.GetNamespace() != "" || r.GetServiceAccount() != "" || r.GetPod() != "" || r.GetNode() != "" || r.GetIncludeExpired() {
		return usage("an agent's SVIDs are filtered by --id and --serial alone; the CA's ledger knows the rest")
	}
	if err := wellFormed(r); err != nil {
		return err
	}
	s, err := c.agentStatus(ctx)
	if err != nil {
		return err
	}
	fits := func(id string, h *meshcav1.HeldSVID) bool {
		return (r.GetSpiffeId() == "" || r.GetSpiffeId() == id) && (r.GetSerial() == "" || sameSerial(r.GetSerial(), h.GetSerial()))
	}
	out := held{Workloads: []message{}}
	if s.GetSelf() != nil && fits(s.GetSelf().GetSpiffeId(), s.GetSelf()) {
		out.Self = &message{s.GetSelf()}
	}
	var shown []*meshcav1.WorkloadStatus
	room := int64(r.GetLimit())
	if out.Self != nil {
		room--
	}
	more := 0
	for _, w := range s.GetWorkloads() {
		switch {
		case !fits(identity(w), w.GetSvid()):
		case int64(len(shown)) == room:
			more++
		default:
			shown = append(shown, w)
			out.Workloads = append(out.Workloads, message{w})
		}
	}
	err = c.show(out, func(p *page) {
		rows := heldRows(p, out.Self != nil, s.GetSelf(), shown)
		if len(rows) == 0 {
			p.line("the agent holds nothing that fits")
			return
		}
		p.table([]string{"SPIFFE ID", "STATE", "SERIAL", "ENDS", "RENEWS", "ROTATIONS", placeTitle(shown), "LAST TROUBLE"}, rows)
	})
	if err == nil && more > 0 {
		fmt.Fprintf(c.err, "certctl: %d more are not shown; --limit shows more, filters narrow it down\n", more)
	}
	return err
}

// wellFormed refuses filters that nothing can fit, as the CA does.
func wellFormed(r *meshcav1.ListSVIDsRequest) error {
	if r.GetSpiffeId() != "" {
		if _, err := spiffeid.FromString(r.GetSpiffeId()); err != nil {
			return no(fmt.Sprintf("%.80q is not a SPIFFE ID", r.GetSpiffeId()), err, "")
		}
	}
	if _, err := serial.Parse(r.GetSerial()); err != nil {
		return no(err.Error(), nil, "")
	}
	return nil
}

// sameSerial compares serials in whatever spelling: agents of an earlier version leave leading zeros out.
func sameSerial(one, other string) bool {
	a, err := serial.Parse(one)
	b, fault := serial.Parse(other)
	return err == nil && fault == nil && a == b
}

func heldRows(p *page, withSelf bool, self *meshcav1.HeldSVID, shown []*meshcav1.WorkloadStatus) [][]cell {
	var rows [][]cell
	row := func(id string, h *meshcav1.HeldSVID, state, socket string, trouble cell) {
		r := []cell{text(id), text(state).as(stateTone(state)), {}, {}, {}, {}, text(socket), trouble}
		if h != nil {
			r[2], r[3], r[4], r[5] = text(h.GetSerial()), p.heldEnds(h), text(p.renewal(h)), textf("%d", h.GetRotations())
		}
		rows = append(rows, r)
	}
	if withSelf {
		state := "fresh"
		if self.GetRemaining().AsDuration() <= 0 {
			state = "expired"
		}
		row(self.GetSpiffeId(), self, state, "(the agent itself)", cell{})
	}
	for _, w := range shown {
		row(identity(w), w.GetSvid(), w.GetState(), place(w), lastTrouble(p, w))
	}
	return rows
}
