package kube_test

import (
	"encoding/base64"
	"encoding/json"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/meshca/meshca/attestor/kubernetes"
	"github.com/meshca/meshca/attestor/kubernetes/localissuer"
)

// What stands in for a cluster on a laptop issues what the API server issues: the same claims of the same types.
func TestLocalIssuersFormIsTheServers(t *testing.T) {
	w := newWorld(t, shared, kubernetes.Config{Name: "prod", Kubeconfig: shared.Kubeconfig})
	pod := w.newPod("web-1", w.node)
	local := must(localissuer.Open(t.TempDir(), "https://tokens.test"))(t)
	made := must(local.Token(localissuer.Subject{
		Namespace: w.namespace, ServiceAccount: "web", ServiceAccountUID: string(w.account.UID),
		Pod: pod.Name, PodUID: string(pod.UID), Node: w.node.Name, NodeUID: string(w.node.UID),
	}, audience, time.Hour))(t)
	real := w.token(pod, audience).Secret()
	for i, part := range []string{"header", "payload"} {
		want, got := decoded(t, real, i), decoded(t, made, i)
		for _, own := range []string{"kid", "iss", "jti"} {
			ours, _ := got[own].(string)
			theirs, _ := want[own].(string)
			if (ours == "") != (theirs == "") || own != "iss" && len(ours) != len(theirs) {
				t.Errorf("%s is %q, want one like %q", own, ours, theirs)
			}
			delete(want, own)
			delete(got, own)
		}
		for _, at := range []string{"iat", "nbf", "exp"} { // the two were not made in the same second
			w, isTime := want[at].(float64)
			g, isToo := got[at].(float64)
			if isTime != isToo || g-w < -60 || g-w > 60 {
				t.Errorf("%s is %v, want about %v", at, got[at], want[at])
			}
			delete(want, at)
			delete(got, at)
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%s:\ngot  %v\nwant %v", part, got, want)
		}
	}
}

func decoded(t *testing.T, token string, part int) map[string]any {
	t.Helper()
	raw := must(base64.RawURLEncoding.DecodeString(strings.Split(token, ".")[part]))(t)
	var m map[string]any
	if err := json.Unmarshal(raw, &m); err != nil {
		t.Fatal(err)
	}
	return m
}
