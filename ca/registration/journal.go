package registration

import (
	"context"
	"io"
	"log/slog"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/api/serial"
	"github.com/meshca/meshca/attestor"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/rotation"
)

// What a decision was about; the `event` of its audit line.
const (
	eventIssue       = "issue"
	eventAttestAgent = "attest-agent"
	eventAdmin       = "admin"
	eventRollout     = "rollout"
	// EventEnd is what ended with its cause, unasked; Caller is then the agent that is told.
	EventEnd = "end"
	// EventCall is a call that a door refused as a whole, before any request in it was looked at.
	EventCall = "call"
)

// OutcomeIssued is a decision's outcome when it ended in an SVID; otherwise the outcome is the refusal's reason.
const OutcomeIssued = "issued"

// Decision is one answer of the registration authority: what `certctl explain` shows and the audit log keeps.
type Decision struct {
	Time    time.Time
	Event   string
	Door    string
	Caller  Caller
	Cluster string
	// Evidence is as far as attestation came; see Evidence.Proven.
	Evidence attestor.Evidence
	// Object is the UID of the API object that asked; empty where none did.
	Object string
	// ID is what policy granted or would have; zero before it was asked.
	ID spiffeid.ID
	// Rule is the policy rule that decided.
	Rule string
	// Outcome is OutcomeIssued or a refusal's reason; Message and Claim belong to the refusal.
	Outcome, Message, Claim string
	Serial                  string
	NotAfter                time.Time
}

// claims notes what an object of the cluster's API says, until that is confirmed.
func (d *Decision) claims(c *Claim) {
	if c != nil {
		d.Evidence, d.Object = c.Said, c.Object
	}
}

func (d *Decision) agent() string {
	if d.Caller.ID.IsZero() {
		return ""
	}
	return d.Caller.ID.String()
}

// Journal records every decision: a JSON line in the audit log, a place in the Ring, a count in the metrics.
type Journal struct {
	ring    *Ring
	metrics *Metrics
	log     *slog.Logger
	audit   *slog.Logger
	out     *auditWriter
}

// NewJournal returns a Journal whose audit lines go to audit, one Write each, and whose own troubles go to log.
func NewJournal(audit io.Writer, ring *Ring, metrics *Metrics, log *slog.Logger) *Journal {
	out := &auditWriter{w: audit}
	return &Journal{ring: ring, metrics: metrics, log: log, out: out, audit: slog.New(slog.NewJSONHandler(out, nil))}
}

// Ring is the memory of recent decisions.
func (j *Journal) Ring() *Ring { return j.ring }

// maxName bounds what is kept of a name that a stranger gives himself.
const maxName = 64

func (j *Journal) begin(event, door string, c Caller, cluster string) *Decision {
	j.metrics.inFlight.Inc()
	return &Decision{Time: time.Now(), Event: event, Door: door, Caller: c, Cluster: refusal.Clip(cluster, maxName)}
}

// Refused records a refusal that a door gave before the procedure began: a malformed call, a limit.
func (j *Journal) Refused(event, door string, c Caller, cluster string, err error) {
	j.conclude(j.begin(event, door, c, cluster), ca.SVID{}, err)
}

// concludePanic is deferred behind begin: a fault in the procedure leaves its decision too, and goes on as the panic.
func (j *Journal) concludePanic(d *Decision) {
	if p := recover(); p != nil {
		j.conclude(d, ca.SVID{}, refusal.New(refusal.Internal, "a fault inside meshca: the log has it"))
		panic(p)
	}
}

// conclude is called once for each begun decision. The audit line is written before the answer leaves.
func (j *Journal) conclude(d *Decision, svid ca.SVID, err error) {
	j.metrics.inFlight.Dec()
	if err == nil {
		d.Outcome, d.ID, d.NotAfter = OutcomeIssued, svid.ID, svid.NotAfter
		d.Serial = serial.String(svid.Chain[0].SerialNumber)
	} else {
		reason := refusal.Of(err)
		d.Outcome, d.Message = string(reason), refusal.Clip(err.Error(), 1024)
		if e, ok := refusal.From(err); ok {
			d.Message, d.Claim = e.Detail, e.Claim
		} else if reason == refusal.Internal {
			j.log.Error("a decision failed for an internal reason", "event", d.Event, "door", d.Door, "err", err)
		}
	}
	j.metrics.observe(d)
	j.ring.add(d)
	j.line(d)
}

// Admin writes the audit line of a verb at the admin socket that changes something.
func (j *Journal) Admin(ctx context.Context, verb, peer string, attrs ...slog.Attr) {
	j.audit.LogAttrs(ctx, slog.LevelInfo, eventAdmin, append([]slog.Attr{slog.String("verb", verb), slog.String("peer", peer)}, attrs...)...)
	j.countFailures()
}

// Rolled writes the audit line of a step in the life of roots.
func (j *Journal) Rolled(r rotation.Rollout) {
	j.audit.LogAttrs(context.Background(), slog.LevelInfo, eventRollout, slog.String("step", string(r.Step)), slog.String("old", r.Old.ID),
		slog.String("new", r.New.ID), slog.String("by", r.By), slog.Int("newShare", r.NewShare), slog.Bool("aborted", r.Aborted),
		slog.String("abortedBy", r.AbortedBy))
	j.countFailures()
}

func (j *Journal) line(d *Decision) {
	level := slog.LevelInfo
	if d.Outcome != OutcomeIssued && d.Event != EventEnd {
		level = slog.LevelWarn
	}
	e, o := d.Evidence, newLine()
	defer o.free()
	// The first three as slog writes them, which writes the lines of the admin socket.
	o.time(slog.TimeKey, time.Now())
	o.text(slog.LevelKey, level.String())
	o.text(slog.MessageKey, d.Event)
	o.text("outcome", d.Outcome)
	o.text("message", d.Message)
	o.text("claim", d.Claim)
	o.text("door", d.Door)
	o.text("peer", d.Caller.Address)
	if d.Event == EventEnd {
		o.text("agent", d.agent())
	} else {
		o.text("caller", d.agent())
	}
	o.text("callerSerial", d.Caller.Serial)
	o.text("cluster", d.Cluster)
	if e.Method != "" || !e.Identity.IsZero() {
		o.bool("proven", e.Proven)
	}
	o.text("method", e.Method)
	o.text("namespace", e.Identity.Namespace())
	o.text("serviceAccount", e.Identity.ServiceAccount())
	o.text("serviceAccountUID", e.ServiceAccountUID)
	o.text("pod", e.PodName)
	o.text("podUID", e.PodUID)
	o.text("node", e.NodeName)
	o.text("nodeUID", e.NodeUID)
	o.text("credentialID", e.CredentialID)
	if !d.ID.IsZero() {
		o.text("spiffeID", d.ID.String())
	}
	o.text("rule", d.Rule)
	o.text("way", d.Way())
	o.text("object", d.Object)
	o.text("serial", d.Serial)
	if !d.NotAfter.IsZero() {
		o.time("notAfter", d.NotAfter.UTC())
	}
	if d.Event != EventEnd {
		o.milliseconds("ms", time.Since(d.Time))
	}
	_, _ = j.out.Write(append(o.end(), '\n')) // counted below
	j.countFailures()
}
