module github.com/meshca/meshca/test/tools/gofail

go 1.26

tool go.etcd.io/gofail

require go.etcd.io/gofail v0.2.0 // indirect
