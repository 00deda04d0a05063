package admin

import (
	"cmp"
	"fmt"
	"strings"
	"time"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
)

const (
	levelOK      = meshcav1.Finding_LEVEL_OK
	levelWarning = meshcav1.Finding_LEVEL_WARNING
	levelError   = meshcav1.Finding_LEVEL_ERROR
)

const (
	// rootWarning is how long before its end a root is worth a warning: moving a fleet to another takes planning, and
	// intermediates get shorter lives in a root's last days.
	rootWarning = 90 * 24 * time.Hour
	// skewWarning and skewError: tokens and certificates carry about a minute of tolerance.
	skewWarning = 10 * time.Second
	skewError   = time.Minute
	// agentQuiet is how long an agent may be without its stream before a check says so; agentForgotten is when it is
	// taken for gone, as its node probably is.
	agentQuiet     = 5 * time.Minute
	agentForgotten = 24 * time.Hour
)

// Findings reads a status as an operator would: what is well, what will be a trouble, what is one. It is pure.
func Findings(s *meshcav1.GetStatusResponse, now time.Time) []*meshcav1.Finding {
	var found []*meshcav1.Finding
	add := func(subject string, level meshcav1.Finding_Level, hint, format string, args ...any) {
		found = append(found, &meshcav1.Finding{Subject: subject, Level: level, Detail: fmt.Sprintf(format, args...), Hint: hint})
	}
	if s.GetReady() {
		add("ready", levelOK, "", "the CA can sign")
	}
	for _, why := range s.GetNotReady() {
		add("ready", levelError, "", "%s", why)
	}
	if r := s.GetRollback(); r != nil {
		add("history", levelError, refusal.CARolledBack.Do(), "the store is an old one: %s has followed state %d (trust bundle %d), and shows it since %s",
			r.GetAgent(), r.GetSeenState(), r.GetSeenBundleSequence(), r.GetSince().AsTime().Format(time.RFC3339))
	}
	for _, what := range s.GetDegraded() {
		add("upstream", levelWarning, refusal.UpstreamUnavailable.Do(), "%s", what)
	}
	for _, a := range s.GetAuthorities() {
		found = append(found, authorityFinding(a, now))
	}
	if f := rolloutFinding(s.GetRollout(), now); f != nil {
		found = append(found, f)
	}
	for _, c := range s.GetClusters() {
		found = append(found, clusterFindings(c)...)
		found = append(found, signerFindings(c, s.GetBundleSequence())...)
	}
	if p := s.GetPolicy(); p.GetLastError() != "" {
		add("policy", levelError, "Mend the file; it is read again by itself. Until then the last good rules stay in force.", "%s is not in force: %s", cmp.Or(p.GetFile(), "the policy file"), p.GetLastError())
	} else {
		add("policy", levelOK, "", "%s", policySays(p))
	}
	return append(found, agentFinding(s, now))
}

func policySays(p *meshcav1.PolicyStatus) string {
	if p.GetRules() == 0 {
		return "no rules: every service account gets its plain ID"
	}
	return fmt.Sprintf("%d rules of %s are in force", p.GetRules(), p.GetFile())
}

func authorityFinding(a *meshcav1.AuthorityStatus, now time.Time) *meshcav1.Finding {
	f := &meshcav1.Finding{Subject: a.GetKind(), Level: levelOK}
	end, renew := a.GetNotAfter().AsTime(), a.GetRenewAt()
	left := end.Sub(now)
	overdue := renew != nil && now.Sub(renew.AsTime()) > max(time.Minute, end.Sub(renew.AsTime())/10)
	name := cmp.Or(a.GetSubject(), a.GetSerial(), a.GetKeyId())
	if a.GetKind() == "server" { // SVIDs have no subject
		name = "the CA's own SVID"
	}
	switch {
	case a.GetNotAfter() == nil:
		f.Level, f.Detail = levelError, "there is none"
		f.Hint = refusal.IssuerNotReady.Do()
	case left <= 0:
		f.Level, f.Detail = levelError, fmt.Sprintf("%s ended %s ago", name, spell(-left))
		f.Hint = "Nothing that chains to it is accepted any more."
	case a.GetKind() == "root" && left < rootWarning:
		f.Level, f.Detail = levelWarning, fmt.Sprintf("%s ends in %s", name, spell(left))
		f.Hint = "`certctl ca rotate root` replaces it; with --dry-run it says what would happen. If it signs for nobody: `certctl ca root remove`."
	case overdue:
		f.Level, f.Detail = levelWarning, fmt.Sprintf("%s ends in %s; its successor was due %s ago", name, spell(left), spell(now.Sub(renew.AsTime())))
		f.Hint = renewalHint(a.GetKind())
	default:
		f.Detail = fmt.Sprintf("%s ends in %s", name, spell(left))
	}
	if a.GetLastError() != "" {
		f.Level = max(f.GetLevel(), levelWarning)
		f.Detail += ": " + a.GetLastError()
		f.Hint = cmp.Or(f.GetHint(), renewalHint(a.GetKind()))
	}
	return f
}

// renewalHint says where to look when a successor does not come: the intermediate's is the upstream's to sign, the CA's
// own SVID is signed by the intermediate.
func renewalHint(kind string) string {
	if kind == "server" {
		return refusal.IssuerNotReady.Do()
	}
	return "Look at the upstream: it signs the CA's intermediate, and does not. `certctl ca status` shows each root's, `certctl ca rotate intermediate` tries again."
}

func clusterFindings(c *meshcav1.ClusterStatus) []*meshcav1.Finding {
	subject := "cluster " + c.GetName()
	f := &meshcav1.Finding{Subject: subject, Level: levelOK, Detail: fmt.Sprintf("tokens are verified (%s, liveness %s)", c.GetMode(), c.GetLiveness())}
	switch {
	case !c.GetHealthy():
		f.Level, f.Detail = levelError, "its tokens cannot be verified now: "+cmp.Or(c.GetLastError(), "no reason given")
		f.Hint = refusal.KubernetesUnavailable.Do()
	case c.GetLastError() != "":
		f.Level, f.Detail = levelWarning, f.GetDetail()+"; the last error: "+c.GetLastError()
	case c.GetWatchFault() != "":
		f.Level, f.Detail = levelWarning, f.GetDetail()+"; what ends is noticed at renewals alone: "+c.GetWatchFault()
		f.Hint = "The CA's account must list and watch pods, nodes, serviceaccounts and namespaces (docs/examples/kubernetes-rights.yaml); the watches are tried again by themselves."
	}
	found := []*meshcav1.Finding{f}
	if c.GetClockSkew() == nil {
		return found
	}
	skew := c.GetClockSkew().AsDuration()
	clock := &meshcav1.Finding{Subject: "clock of " + subject, Level: levelOK, Detail: fmt.Sprintf("the API server's clock is %s", offset(skew))}
	switch {
	case skew.Abs() > skewError:
		clock.Level = levelError
	case skew.Abs() > skewWarning:
		clock.Level = levelWarning
	}
	if clock.GetLevel() != levelOK {
		clock.Hint = "Set the clocks of the CA and of the cluster's control plane by one source (NTP): tokens look expired or not yet valid."
	}
	return append(found, clock)
}

// offset spells a measured clock difference: theirs minus ours.
func offset(d time.Duration) string {
	switch {
	case d.Abs() < time.Second:
		return "equal to the CA's within a second"
	case d > 0:
		return spell(d) + " ahead of the CA's"
	}
	return spell(-d) + " behind the CA's"
}

func agentFinding(s *meshcav1.GetStatusResponse, now time.Time) *meshcav1.Finding {
	var quiet, behind []string
	connected := 0
	for _, a := range s.GetAgents() {
		since := now.Sub(a.GetLastSeen().AsTime())
		switch {
		case a.GetConnected():
			connected++
			if a.GetAckedBundleSequence() < s.GetBundleSequence() {
				behind = append(behind, a.GetNode())
			}
		case since > agentQuiet && since < agentForgotten:
			quiet = append(quiet, a.GetNode())
		}
	}
	f := &meshcav1.Finding{Subject: "agents", Level: levelOK, Detail: fmt.Sprintf("%d connected", connected)}
	if len(behind) > 0 {
		f.Detail += fmt.Sprintf("; not yet acknowledged bundle %d: %s", s.GetBundleSequence(), some(behind))
	}
	if len(quiet) > 0 {
		f.Level = levelWarning
		f.Detail += fmt.Sprintf("; seen within a day and not connected: %s", some(quiet))
		f.Hint = "Run `certctl check` on those nodes. Nodes that were removed are forgotten after a day."
	}
	return f
}

func some(names []string) string {
	const most = 5
	if len(names) > most {
		return strings.Join(names[:most], ", ") + fmt.Sprintf(" and %d more", len(names)-most)
	}
	return strings.Join(names, ", ")
}

// spell writes a duration in its two largest units: 71h59m, 5m30s, 89d4h.
func spell(d time.Duration) string {
	const day = 24 * time.Hour
	d = d.Round(time.Second)
	unit, sub, names := time.Minute, time.Second, [2]string{"m", "s"}
	switch {
	case d >= 3*day:
		unit, sub, names = day, time.Hour, [2]string{"d", "h"}
	case d >= time.Hour:
		unit, sub, names = time.Hour, time.Minute, [2]string{"h", "m"}
	case d < time.Minute:
		return fmt.Sprintf("%ds", d/time.Second)
	}
	text := fmt.Sprintf("%d%s", d/unit, names[0])
	if rest := d % unit / sub; rest > 0 {
		text += fmt.Sprintf("%d%s", rest, names[1])
	}
	return text
}
