package admin

import (
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/attestor"
	"github.com/meshca/meshca/ca/registration"
)

func TestExplain(t *testing.T) {
	f := start(t, "rules: []")
	who, _ := attestor.NewIdentity("prod", "shop", "cart")
	f.decisions.all = []registration.Decision{{
		Time: time.Now(), Event: "issue", Door: "grpc", Cluster: "prod", Outcome: "POD_NOT_ON_NODE", Message: "pod runs on node a", Claim: "kubernetes.io.node.uid",
		Caller:   registration.Caller{Address: "10.0.0.1:4", ID: spiffeid.RequireFromPath(td, "/meshca/agent/prod/n1")},
		Evidence: attestor.Evidence{Identity: who, PodName: "cart-1", NodeName: "n1"},
	}, {
		Time: time.Now(), Door: "grpc", Outcome: "issued", ID: spiffeid.RequireFromPath(td, "/ns/shop/sa/cart"), Serial: "ab", NotAfter: time.Now(),
		Caller: registration.Caller{Address: "10.0.0.1:4"}, Rule: "default",
	}}
	got, err := f.CA.Explain(t.Context(), &meshcav1.ExplainRequest{About: &meshcav1.ExplainRequest_Pod{Pod: &meshcav1.PodName{Namespace: "shop", Name: "cart-1"}}})
	if err != nil || f.decisions.asked != "pod shop/cart-1 20" || len(got.GetDecisions()) != 2 {
		t.Fatalf("got %v, %v after asking %s", got, err, f.decisions.asked)
	}
	d := got.GetDecisions()[0]
	if d.GetHint() != refusal.PodNotOnNode.Do() || d.GetCaller() != "spiffe://mesh.example/meshca/agent/prod/n1" || d.GetClaim() != "kubernetes.io.node.uid" ||
		d.GetEvidence().GetPod() != "cart-1" || d.GetEvidence().GetCluster() != "prod" || d.GetSpiffeId() != "" || d.GetNotAfter() != nil {
		t.Errorf("got %v", d)
	}
	if d := got.GetDecisions()[1]; d.GetHint() != "" || d.GetCaller() != "10.0.0.1:4" || d.GetSpiffeId() != "spiffe://mesh.example/ns/shop/sa/cart" || d.GetNotAfter() == nil {
		t.Errorf("got %v", d)
	}
	if time.Since(got.GetSince().AsTime()) > time.Minute {
		t.Errorf("memory since %s; nothing was forgotten since the start", got.GetSince().AsTime())
	}

	const id = "spiffe://mesh.example/ns/shop/sa/cart"
	if _, err := f.CA.DenySVID(t.Context(), &meshcav1.DenySVIDRequest{SpiffeId: id, Why: "test"}); err != nil {
		t.Fatal(err)
	}
	f.decisions.since = time.Now().Add(-time.Hour)
	got, err = f.CA.Explain(t.Context(), &meshcav1.ExplainRequest{About: &meshcav1.ExplainRequest_SpiffeId{SpiffeId: id}, Limit: 1})
	if err != nil || f.decisions.asked != "id "+id+" 1" || len(got.GetDecisions()) != 1 || got.GetDenial().GetWhy() != "test" || time.Since(got.GetSince().AsTime()) < time.Hour {
		t.Errorf("got %v, %v after asking %s", got, err, f.decisions.asked)
	}
	for _, r := range []*meshcav1.ExplainRequest{
		{}, {About: &meshcav1.ExplainRequest_SpiffeId{SpiffeId: "x"}}, {About: &meshcav1.ExplainRequest_Pod{Pod: &meshcav1.PodName{Name: "x"}}},
		{About: &meshcav1.ExplainRequest_SpiffeId{SpiffeId: id}, Limit: MaxDecisions + 1},
	} {
		_, err := f.CA.Explain(t.Context(), r)
		wantReason(t, err, refusal.RequestMalformed)
	}
}

func TestTestPolicy(t *testing.T) {
	f := start(t, "rules: [{name: sys, namespaces: [kube-*], deny: no}, {name: no-sys, namespaces: [kube-system], deny: system}, {name: shop, namespaces: [shop], ttl: 1h}]")
	got, err := f.CA.TestPolicy(t.Context(), &meshcav1.TestPolicyRequest{Namespace: "shop", ServiceAccount: "cart"})
	if err != nil || got.GetCluster() != "prod" || got.GetGrant().GetSpiffeId() != "spiffe://mesh.example/ns/shop/sa/cart" || got.GetGrant().GetTtl().AsDuration() != time.Hour ||
		got.GetGrant().GetRule() != "shop" || len(got.GetRules()) != 3 || got.GetRefusal() != nil {
		t.Errorf("got %v, %v", got, err)
	}
	got, err = f.CA.TestPolicy(t.Context(), &meshcav1.TestPolicyRequest{Cluster: "prod", Namespace: "elsewhere", ServiceAccount: "x"})
	if err != nil || got.GetRefusal().GetReason() != "POLICY_NO_RULE" || got.GetRefusal().GetCode() != uint32(codes.PermissionDenied) || got.GetGrant() != nil || len(got.GetRules()) != 3 {
		t.Errorf("got %v, %v", got, err)
	}
	got, err = f.CA.TestPolicy(t.Context(), &meshcav1.TestPolicyRequest{Token: "good"})
	if err != nil || got.GetGrant().GetSpiffeId() != "spiffe://mesh.example/ns/shop/sa/cart" || got.GetNamespace() != "shop" {
		t.Errorf("got %v, %v", got, err)
	}
	got, err = f.CA.TestPolicy(t.Context(), &meshcav1.TestPolicyRequest{Token: "bad"})
	if err != nil || got.GetRefusal().GetReason() != "TOKEN_EXPIRED" || got.GetServiceAccount() != "cart" || len(got.GetRules()) != 0 {
		t.Errorf("got %v, %v", got, err)
	}
	if _, err := f.CA.DenySVID(t.Context(), &meshcav1.DenySVIDRequest{SpiffeId: "spiffe://mesh.example/ns/shop/sa/cart", Why: "test"}); err != nil {
		t.Fatal(err)
	}
	got, err = f.CA.TestPolicy(t.Context(), &meshcav1.TestPolicyRequest{Token: "good"})
	if err != nil || got.GetRefusal().GetReason() != "IDENTITY_DENIED" || got.GetGrant() != nil {
		t.Errorf("got %v, %v", got, err)
	}
	for want, r := range map[refusal.Reason]*meshcav1.TestPolicyRequest{
		refusal.ClusterUnknown:   {Cluster: "prd", Namespace: "a", ServiceAccount: "b"},
		refusal.RequestMalformed: {Namespace: "a/b", ServiceAccount: "b"},
	} {
		_, err := f.CA.TestPolicy(t.Context(), r)
		wantReason(t, err, want)
	}
	_, err = f.CA.TestPolicy(t.Context(), &meshcav1.TestPolicyRequest{Namespace: "a", Token: "good"})
	wantReason(t, err, refusal.RequestMalformed)
	_, err = f.CA.TestPolicy(t.Context(), &meshcav1.TestPolicyRequest{Token: strings.Repeat("x", maxMessage)})
	if status.Code(err) != codes.ResourceExhausted {
		t.Errorf("a request over the bound: %v", err)
	}
}
