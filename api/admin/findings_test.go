package admin

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
)

func TestFindings(t *testing.T) {
	now := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	at := func(d time.Duration) *timestamppb.Timestamp { return timestamppb.New(now.Add(d)) }
	cluster := func(c *meshcav1.ClusterStatus) *meshcav1.GetStatusResponse {
		c.Name, c.Mode, c.Liveness = "prod", "jwks", "api"
		return &meshcav1.GetStatusResponse{Clusters: []*meshcav1.ClusterStatus{c}}
	}
	authority := func(a *meshcav1.AuthorityStatus) *meshcav1.GetStatusResponse {
		return &meshcav1.GetStatusResponse{Authorities: []*meshcav1.AuthorityStatus{a}}
	}
	agents := func(a ...*meshcav1.AgentInfo) *meshcav1.GetStatusResponse {
		return &meshcav1.GetStatusResponse{BundleSequence: 3, Agents: a}
	}
	published := func(p *meshcav1.PublicationStatus) *meshcav1.GetStatusResponse {
		s := cluster(&meshcav1.ClusterStatus{Healthy: true, Published: []*meshcav1.PublicationStatus{p}})
		s.BundleSequence = 3
		return s
	}
	for name, c := range map[string]struct {
		status *meshcav1.GetStatusResponse
		want   string // level subject: detail
	}{
		"ready":     {&meshcav1.GetStatusResponse{Ready: true}, "OK ready: the CA can sign"},
		"degraded":  {&meshcav1.GetStatusResponse{Ready: true, Degraded: []string{"vault is away"}}, "WARNING upstream: vault is away"},
		"not ready": {&meshcav1.GetStatusResponse{NotReady: []string{"no intermediate"}}, "ERROR ready: no intermediate"},
		"intermediate": {authority(&meshcav1.AuthorityStatus{Kind: "intermediate", Subject: "CN=i", NotAfter: at(71*time.Hour + 5*time.Minute), RenewAt: at(time.Hour)}),
			"OK intermediate: CN=i ends in 71h5m"},
		"intermediate missing": {authority(&meshcav1.AuthorityStatus{Kind: "intermediate"}), "ERROR intermediate: there is none"},
		"intermediate ended":   {authority(&meshcav1.AuthorityStatus{Kind: "intermediate", Subject: "CN=i", NotAfter: at(-90 * time.Second)}), "ERROR intermediate: CN=i ended 1m30s ago"},
		"intermediate overdue": {authority(&meshcav1.AuthorityStatus{Kind: "intermediate", Subject: "CN=i", NotAfter: at(24 * time.Hour), RenewAt: at(-12 * time.Hour)}),
			"WARNING intermediate: CN=i ends in 24h; its successor was due 12h ago"},
		"intermediate just due": {authority(&meshcav1.AuthorityStatus{Kind: "intermediate", Subject: "CN=i", NotAfter: at(36 * time.Hour), RenewAt: at(-time.Minute)}),
			"OK intermediate: CN=i ends in 36h"},
		"intermediate errs": {authority(&meshcav1.AuthorityStatus{Kind: "intermediate", Subject: "CN=i", NotAfter: at(48 * time.Hour), LastError: "vault is sealed"}),
			"WARNING intermediate: CN=i ends in 48h: vault is sealed"},
		"server": {authority(&meshcav1.AuthorityStatus{Kind: "server", Serial: "ab", NotAfter: at(time.Hour), LastError: "no intermediate"}),
			"WARNING server: the CA's own SVID ends in 1h: no intermediate"},
		"root":                  {authority(&meshcav1.AuthorityStatus{Kind: "root", Subject: "CN=r", NotAfter: at(3650 * 24 * time.Hour)}), "OK root: CN=r ends in 3650d"},
		"root ends soon":        {authority(&meshcav1.AuthorityStatus{Kind: "root", Subject: "CN=r", NotAfter: at(29*24*time.Hour + time.Hour)}), "WARNING root: CN=r ends in 29d1h"},
		"root ends in a season": {authority(&meshcav1.AuthorityStatus{Kind: "root", Subject: "CN=r", NotAfter: at(89 * 24 * time.Hour)}), "WARNING root: CN=r ends in 89d"},
		"root ends later":       {authority(&meshcav1.AuthorityStatus{Kind: "root", Subject: "CN=r", NotAfter: at(91 * 24 * time.Hour)}), "OK root: CN=r ends in 91d"},
		"cluster":               {cluster(&meshcav1.ClusterStatus{Healthy: true}), "OK cluster prod: tokens are verified (jwks, liveness api)"},
		"cluster down":          {cluster(&meshcav1.ClusterStatus{LastError: "no route"}), "ERROR cluster prod: its tokens cannot be verified now: no route"},
		"cluster erred":         {cluster(&meshcav1.ClusterStatus{Healthy: true, LastError: "timeout"}), "WARNING cluster prod: tokens are verified (jwks, liveness api); the last error: timeout"},
		"cluster unwatched":     {cluster(&meshcav1.ClusterStatus{Healthy: true, WatchFault: "no"}), "WARNING cluster prod: tokens are verified (jwks, liveness api); what ends is noticed at renewals alone: no"},
		"clock":                 {cluster(&meshcav1.ClusterStatus{Healthy: true, ClockSkew: durationpb.New(-300 * time.Millisecond)}), "OK clock of cluster prod: the API server's clock is equal to the CA's within a second"},
		"clock off":             {cluster(&meshcav1.ClusterStatus{Healthy: true, ClockSkew: durationpb.New(-30 * time.Second)}), "WARNING clock of cluster prod: the API server's clock is 30s behind the CA's"},
		"clock far off":         {cluster(&meshcav1.ClusterStatus{Healthy: true, ClockSkew: durationpb.New(10 * time.Minute)}), "ERROR clock of cluster prod: the API server's clock is 10m ahead of the CA's"},
		"signer": {cluster(&meshcav1.ClusterStatus{Healthy: true, Signers: []*meshcav1.SignerStatus{{Api: "podcertificaterequests", State: "serving", Pending: 2}}}),
			"OK signer of cluster prod: podcertificaterequests are answered, 2 are open"},
		"signer without an API": {cluster(&meshcav1.ClusterStatus{Healthy: true, Signers: []*meshcav1.SignerStatus{{Api: "podcertificaterequests", State: "not served", Why: "none"}}}),
			"WARNING signer of cluster prod: podcertificaterequests are not answered (not served): none"},
		"published":              {published(&meshcav1.PublicationStatus{Name: "prod/configmap/a/b", Sequence: 3}), "OK trust published: prod/configmap/a/b has bundle 3"},
		"published not yet":      {published(&meshcav1.PublicationStatus{Name: "prod/configmap/a/b", Sequence: 2}), "WARNING trust published: prod/configmap/a/b has bundle 2, and the CA 3"},
		"published nowhere":      {published(&meshcav1.PublicationStatus{Name: "prod/configmap/a/b", Sequence: 3, Fault: "forbidden"}), "WARNING trust published: prod/configmap/a/b: forbidden"},
		"published where nobody": {published(&meshcav1.PublicationStatus{Name: "prod/x", NotServed: true, Fault: "not served"}), "WARNING trust published: prod/x: not served"},
		"published apart":        {published(&meshcav1.PublicationStatus{Name: "prod/configmap/team/x", Apart: true, Fault: "somebody else's"}), "WARNING trust published: prod/configmap/team/x: somebody else's"},
		"no rules":               {&meshcav1.GetStatusResponse{}, "OK policy: no rules: every service account gets its plain ID"},
		"rules":                  {&meshcav1.GetStatusResponse{Policy: &meshcav1.PolicyStatus{File: "/p", Rules: 2}}, "OK policy: 2 rules of /p are in force"},
		"bad policy":             {&meshcav1.GetStatusResponse{Policy: &meshcav1.PolicyStatus{File: "/p", LastError: "line 3"}}, "ERROR policy: /p is not in force: line 3"},
		"no agents":              {agents(), "OK agents: 0 connected"},
		"agents behind":          {agents(&meshcav1.AgentInfo{Node: "n1", Connected: true, AckedBundleSequence: 2}, &meshcav1.AgentInfo{Node: "n2", Connected: true, AckedBundleSequence: 3}), "OK agents: 2 connected; not yet acknowledged bundle 3: n1"},
		"agent away":             {agents(&meshcav1.AgentInfo{Node: "n1", LastSeen: at(-time.Hour)}), "WARNING agents: 0 connected; seen within a day and not connected: n1"},
		"agent restarts":         {agents(&meshcav1.AgentInfo{Node: "n1", LastSeen: at(-time.Minute)}), "OK agents: 0 connected"},
		"agent forgotten":        {agents(&meshcav1.AgentInfo{Node: "n1", LastSeen: at(-25 * time.Hour)}), "OK agents: 0 connected"},
	} {
		t.Run(name, func(t *testing.T) {
			var all []string
			for _, f := range Findings(c.status, now) {
				all = append(all, fmt.Sprintf("%s %s: %s", strings.TrimPrefix(f.GetLevel().String(), "LEVEL_"), f.GetSubject(), f.GetDetail()))
				if (f.GetHint() == "") != (f.GetLevel() == levelOK) && f.GetSubject() != "ready" && !strings.Contains(f.GetDetail(), "last error") {
					t.Errorf("%s of level %s has the hint %q", f.GetSubject(), f.GetLevel(), f.GetHint())
				}
			}
			if !strings.Contains("\n"+strings.Join(all, "\n")+"\n", "\n"+c.want+"\n") {
				t.Errorf("got\n%s\nwant among them\n%s", strings.Join(all, "\n"), c.want)
			}
		})
	}
}

func TestRolloutFinding(t *testing.T) {
	now := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	at := func(d time.Duration) *timestamppb.Timestamp { return timestamppb.New(now.Add(d)) }
	for name, c := range map[string]struct {
		rollout *meshcav1.RolloutStatus
		want    string // level: detail
		hint    string
	}{
		"none": {nil, "", ""},
		"over": {&meshcav1.RolloutStatus{Step: "out"}, "", ""},
		"confirms": {&meshcav1.RolloutStatus{Active: true, Step: "published", Entered: at(-59 * time.Minute), Waits: []string{"spiffe://a"}},
			"OK: published since 59m; it waits for spiffe://a", ""},
		"does not confirm": {&meshcav1.RolloutStatus{Active: true, Step: "published", Entered: at(-61 * time.Minute), Waits: []string{"spiffe://a", "reader x"}},
			"WARNING: published since 1h1m; it waits for spiffe://a, reader x", "--despite"},
		"an emergency has its end": {&meshcav1.RolloutStatus{Active: true, Step: "published", Entered: at(-2 * time.Hour), Until: at(time.Minute), Waits: []string{"spiffe://a"}},
			"OK: published since 2h; it waits for spiffe://a", ""},
		"a canary forgotten":   {&meshcav1.RolloutStatus{Active: true, Step: "canary", Entered: at(-2 * time.Hour)}, "WARNING: canary since 2h", "certctl ca continue"},
		"the last certificate": {&meshcav1.RolloutStatus{Active: true, Step: "retired", Entered: at(-5 * time.Hour), Until: at(time.Hour)}, "OK: retired since 5h", ""},
		"the last is over":     {&meshcav1.RolloutStatus{Active: true, Step: "retired", Entered: at(-5 * time.Hour), Until: at(-2 * time.Minute)}, "WARNING: retired since 5h", "log"},
		"it fails": {&meshcav1.RolloutStatus{Active: true, Step: "chosen", Entered: at(-time.Second), Error: "sealed"},
			"WARNING: chosen since 1s; its last try failed: sealed", "certctl ca abort"},
	} {
		got := ""
		f := rolloutFinding(c.rollout, now)
		if f != nil {
			got = strings.TrimPrefix(f.GetLevel().String(), "LEVEL_") + ": " + f.GetDetail()
		}
		if got != c.want || (c.hint == "") != (f.GetHint() == "") || !strings.Contains(f.GetHint(), c.hint) {
			t.Errorf("%s: got %q with the hint %q", name, got, f.GetHint())
		}
	}
}
