package csi

import (
	"os"
	"testing"
	"time"

	"github.com/meshca/meshca/api/refusal"
)

// TestACAThatWasMadeAnew: docs/kubernetes.md, "A root that is gone". For its pods an agent keeps its bundle on the node. While
// the file is that of the CA before, pods wait; with the new one all get their identities, a pod that runs too.
func TestACAThatWasMadeAnew(t *testing.T) {
	n := newNode(t)
	n.config.CleanUp = true
	n.csi.Timeout = time.Second
	n.start()
	web := n.pod("web")
	must(t, web.publish())
	before := web.sees()
	n.halt()
	n.ca.Stop()
	var err error
	n.ca, err = n.ca.Anew()
	must(t, err)
	_, err = n.ca.Start()
	must(t, err)
	t.Cleanup(n.ca.Stop)
	n.start()
	next := n.pod("next")
	if err := next.publish(); refusal.Of(err) != refusal.SVIDPending {
		t.Errorf("a pod that starts is told %v", err)
	}
	must(t, os.WriteFile(n.path("bundle.json"), n.ca.Bundle(), 0o600)) // what the kubelet shows of the ConfigMap
	eventually(t, "the kubelet's next try succeeds", func() bool { return next.publish() == nil })
	eventually(t, "the pod that runs has a new one", func() bool { now := web.sees(); return now != "" && now != before })
	if seen := n.ca.Seen(); len(seen.Violations) > 0 || seen.Attests == 0 {
		t.Errorf("the CA saw %+v", seen)
	}
	must(t, web.unpublish())
	must(t, next.unpublish())
}
