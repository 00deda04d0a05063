package sds_test

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"

	"github.com/meshca/meshca/api/sds"
	"github.com/meshca/meshca/rotation"
	"github.com/meshca/meshca/test/pki"
)

// A server for one workload: whoever reaches its socket is served the same secrets, and each Set is pushed to all.
func ExampleNew() {
	var current rotation.Current[*sds.Secrets]
	server, err := sds.New(sds.Config{
		Source: func(context.Context) (sds.Source, error) { return sds.SourceFunc(current.Get), nil },
		Observe: sds.Observe{
			Nacked: func(s sds.Stream, n sds.Nack) {
				slog.Warn("a proxy refused what it was sent", "node", s.Node, "names", n.Names, "detail", n.Detail)
			},
		},
	})
	if err != nil {
		panic(err)
	}
	g := grpc.NewServer(server.ServerOptions()...)
	secretv3.RegisterSecretDiscoveryServiceServer(g, server)

	root, err := pki.NewRoot("td.test")
	if err != nil {
		panic(err)
	}
	svid, err := root.SVID("/ns/shop/sa/web", time.Hour)
	if err != nil {
		panic(err)
	}
	secrets, err := sds.NewSecrets(sds.SecretsConfig{
		SVIDs: []*x509svid.SVID{svid}, Bundles: []*spiffebundle.Bundle{root.Bundle(7)},
	})
	if err != nil {
		panic(err)
	}
	current.Set(secrets)
	fmt.Println(secrets, secrets.Sequence())
	lacking, _ := server.Acknowledged(7)
	fmt.Println(lacking, "streams lack it")
	// Output:
	// (secrets) 7
	// 0 streams lack it
}
