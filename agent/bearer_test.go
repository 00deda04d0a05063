package agent

import (
	"encoding/base64"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshca/meshca/api/refusal"
)

// tokenOf is a token of a pod's service account; n tells apart those of one pod.
func tokenOf(account, uid string, n int) string {
	payload := fmt.Appendf(nil, `{"sub":"system:serviceaccount:test:%s","kubernetes.io":{"pod":{"name":"p","uid":"%s"}},"exp":%d}`, account, uid, 2_000_000_000+n)
	return "e30." + base64.RawURLEncoding.EncodeToString(payload) + ".c2ln"
}

// give makes a token prove an account and puts it into the file.
func (n *node) give(file, account, uid string, number int) {
	n.t.Helper()
	token := tokenOf(account, uid, number)
	n.ca.Workload(token, "/ns/test/sa/"+account)
	n.write(file, token)
}

func TestBearerOther(t *testing.T) {
	a := Bearer{"system:serviceaccount:a:b", "1"}
	for _, c := range []struct {
		was, is Bearer
		want    bool
	}{
		{a, a, false},
		{a, Bearer{a.Subject, "2"}, true},
		{a, Bearer{"system:serviceaccount:a:c", "1"}, true},
		{a, Bearer{a.Subject, ""}, false},
		{a, Bearer{}, false},
		{Bearer{}, a, false},
	} {
		if got := c.was.Other(c.is); got != c.want {
			t.Errorf("%v, then %v: %t", c.was, c.is, got)
		}
	}
	for _, bad := range []string{"", "x", "a.b.c", "..", "e30.W10.x", "e30.eyJzdWIiOjF9.x"} {
		if got := (token{bad}).bearer(); got != (Bearer{}) {
			t.Errorf("%q: %v", bad, got)
		}
	}
}

func TestRestartServesNobodyElsesSVID(t *testing.T) {
	n := newNode(t)
	for _, name := range []string{"same", "pod", "account", "unreadable"} {
		n.workload(name)
		n.give(name+".token", name, "uid-1", 1)
	}
	a := n.start()
	eventually(t, "fresh", func() bool {
		return a.state(0) == "fresh" && a.state(1) == "fresh" && a.state(2) == "fresh" && a.state(3) == "fresh"
	})
	must(t, a.stop())
	n.ca.Stop()
	n.give("same.token", "same", "uid-1", 2)
	n.give("pod.token", "pod", "uid-2", 1)
	n.give("account.token", "stranger", "uid-1", 1)
	must(t, os.Remove(n.path("unreadable.token")))

	b := n.start()
	for i, want := range []string{"fresh", "pending", "pending", "fresh"} {
		served := fetch(t, b.config.Workloads[i].Socket, "default")
		if got := b.state(i); want == "fresh" && got != "fresh" && got != "stale" || want == "pending" && got != "pending" || (served["default"] != nil) != (want == "fresh") {
			t.Errorf("workload %d: %s, want %s; served: %t", i, got, want, served["default"] != nil)
		}
	}
}

func TestTokenFileThatComesToBeSomebodyElses(t *testing.T) {
	if testing.Short() {
		t.Skip("takes as long as the agent takes to notice")
	}
	n := newNode(t)
	for _, name := range []string{"refreshed", "taken", "refused"} {
		n.workload(name)
		n.give(name+".token", name, "uid-1", 1)
	}
	n.ca.Refuse(func(id spiffeid.ID) error {
		if id.Path() == "/ns/test/sa/nobody" {
			return refusal.New(refusal.PolicyDenied, "not you")
		}
		return nil
	})
	a := n.start()
	eventually(t, "fresh", func() bool { return a.state(0) == "fresh" && a.state(1) == "fresh" && a.state(2) == "fresh" })
	n.give("refreshed.token", "refreshed", "uid-1", 2)
	n.give("taken.token", "heir", "uid-2", 1)
	n.give("refused.token", "nobody", "uid-3", 1)
	time.Sleep(lookEvery)
	eventually(t, "the heir has its own, the refused nothing", func() bool {
		w := a.status().GetWorkloads()
		return w[1].GetSvid().GetSpiffeId() == "spiffe://mesh.test/ns/test/sa/heir" && w[2].GetState() == "refused"
	})
	if got := fetch(t, n.path("refused.sock"), "default", "ROOTCA"); got["default"] != nil || got["ROOTCA"] == nil {
		t.Errorf("served: %v", got)
	}
	if issued := n.ca.Seen().Issued[spiffeid.RequireFromString("spiffe://mesh.test/ns/test/sa/refreshed")]; issued != 1 {
		t.Errorf("%d SVIDs for a token that was merely refreshed", issued)
	}
}
